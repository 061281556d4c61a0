"""The message format that GPT-OSS speaks, as far as reading a reply needs it.

A message is `<|start|>ROLE<|channel|>CHANNEL<|message|>TEXT` and an end token; a reply holds several, on the channels
analysis (its thoughts), commentary (tool calls) and final (what the user is told).
Source: github.com/openai/harmony, docs/format.md
"""

from __future__ import annotations

import re

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
END = re.compile(r"<\|(?:end|return|call)\|>")


def reply_parts(text: str) -> tuple[str, str]:
    """Thoughts and answer in a reply, finished or not; messages of one kind are a blank line apart.

    text: what follows the generation prompt, which ends with `<|start|>assistant`, so that a header comes first, or,
    in templates without channels, with `<|message|>`.
    """
    thoughts: list[str] = []
    answers: list[str] = []
    first, *others = text.split(START)
    if first.startswith((CHANNEL, MESSAGE)):
        others.insert(0, first)
    else:
        answers.append(END.split(first)[0])
    for message in others:
        header, has_body, body = message.partition(MESSAGE)
        if has_body:
            channel = header.partition(CHANNEL)[2].strip()
            (answers if channel in ("", "final") else thoughts).append(END.split(body)[0])
    return "\n\n".join(filter(None, thoughts)), "\n\n".join(filter(None, answers))
