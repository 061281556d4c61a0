"""A conversation with a model in its own chat format, reply by reply, each streamed as it comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from nexus_core.checkpoint.source import Checkpoint
from nexus_core.data.tokenizers import reply_end_ids
from nexus_core.errors import UsageError
from nexus_core.models import stated_end_ids

# What a decoder puts where a character's last bytes are still to come.
INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class Reply:
    """What the model thought, what it said, how many tokens that took, and whether it ended its turn itself."""

    thoughts: str
    answer: str
    tokens: int
    is_finished: bool


@dataclass
class Conversation:
    """The turns so far. `ask` adds one of the user's and the model's answer.

    temperature: 0 always takes the most likely token. messages: as the chat template takes them, role and content.
    """

    model: Any
    tokenizer: PreTrainedTokenizerFast
    checkpoint: Checkpoint
    max_new_tokens: int = 512
    temperature: float = 0.0
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise UsageError(
                f"{self.checkpoint.name}: its tokenizer has no chat template, so it is not a model to talk to; copy "
                "chat_template.jinja from its chat version into the folder"
            )
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, text: str, say: Callable[[str, str], object]) -> Reply:
        """The model's reply to the user's next turn.

        say: called with what is new in thoughts and answer, as soon as it is known. Interrupted, neither turn is kept.
        Raises UsageError if the conversation is longer than the model's context.
        """
        turns = [*self.messages, {"role": "user", "content": text}]
        encoded: Any = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        encoded = encoded.to(self.model.device)
        room = self._context_tokens() - encoded["input_ids"].shape[1]
        if room < 1:
            raise UsageError(
                f"the conversation is longer than the model's {self._context_tokens()} tokens; /reset begins anew"
            )
        ends = self.end_tokens()
        stream = _ReplyStream(self.tokenizer, self._parts, say)
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature > 0 else GREEDY
        self.model.generate(
            **{name: encoded[name] for name in ("input_ids", "attention_mask")},
            max_new_tokens=min(self.max_new_tokens, room),
            eos_token_id=ends,
            pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else ends[0],
            streamer=stream,
            **sampling,
        )
        self.messages = [*turns, {"role": "assistant", "content": stream.answer}]
        return Reply(stream.thoughts, stream.answer, len(stream.tokens), stream.tokens[-1] in ends)

    def end_tokens(self) -> list[int]:
        """The tokens that end the model's turn."""
        return reply_end_ids(self.tokenizer, stated_end_ids(self.model))

    def _context_tokens(self) -> int:
        return int(getattr(self.model.config, "max_position_embeddings", None) or 1 << 30)

    def _parts(self, text: str) -> tuple[str, str]:
        return self.checkpoint.family.hook.nexus_reply_parts(config=self.checkpoint.config, text=text)


# The sampling settings a checkpoint may bring along mean nothing here, and transformers warns of each.
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


class _ReplyStream(BaseStreamer):
    """Gets tokens from `generate` and says what they add to the reply; a character is said when it is whole."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        parts: Callable[[str], tuple[str, str]],
        say: Callable[[str, str], object],
    ):
        self._tokenizer, self._parts, self._say = tokenizer, parts, say
        self._specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._prompt_is_next = True
        self.tokens: list[int] = []
        self.thoughts = self.answer = ""

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self.tokens += value.flatten().tolist()
        self._update(is_last=False)

    def end(self) -> None:
        self._update(is_last=True)

    def _update(self, *, is_last: bool) -> None:
        text = str(self._tokenizer.decode(self.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if text.endswith(INCOMPLETE) and not is_last:
            return
        thoughts, answer = (self._without_specials(part) for part in self._parts(text))
        new_thoughts, new_answer = thoughts[len(self.thoughts) :], answer[len(self.answer) :]
        self.thoughts, self.answer = thoughts, answer
        if new_thoughts or new_answer:
            self._say(new_thoughts, new_answer)

    def _without_specials(self, text: str) -> str:
        for token in self._specials:
            text = text.replace(token, "")
        return text
