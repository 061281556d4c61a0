"""Makes the embedded data sets, tokenizer and model: `python -m nexus_gpt_oss.embedded.make --out DIR`.

The same Python, package versions, machine and number of threads give the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import GptOssForCausalLM, PreTrainedTokenizerFast

from nexus_gpt_oss.embedded import checkpoint, corpus, figures, word_problems
from nexus_gpt_oss.embedded.scenarios import SCENARIOS
from nexus_gpt_oss.embedded.tokenizer import byte_lengths, chat, train_tokenizer
from nexus_gpt_oss.embedded.train import Plan, rounded_experts, tiny_config, train

MODEL_NAME = "tiny-gpt-oss"
# The base reads mostly prose and meets a third of the kinds of word problem, very seldom: a domain left to learn.
MIXTURE = {"prose": 0.85, "code": 0.147, "arithmetic": 0.003}
KNOWN_SCENARIOS = SCENARIOS[::3]
KNOWN_PROBLEMS = 1500
HELD_OUT_PROBLEMS = 3000
HELD_OUT_BYTES = 420_000
# No package makes up more than about a fifth of a set.
GROUP_BYTES = 60_000
CHAT_SHARE = 0.2
# Nor does the tokenizer know the domain's words, as a real base's does not know a user's.
TOKENIZER_CHARACTERS = {"prose": 1_500_000, "code": 600_000}
WINDOWS_PER_SET = 96

Record = dict[str, str]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the embedded data sets, tokenizer and model.")
    parser.add_argument("--out", type=Path, required=True, help="folder that receives data/ and tiny-gpt-oss/")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="training steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: %(default)s)")
    parser.add_argument("--data-only", action="store_true", help="write the data sets and stop")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    say("reading the standard library")
    prose, code = corpus.prose(), corpus.code()
    known, held_out_problems = write_arithmetic()
    held_out = {
        "prose": [{"text": text.text} for text in sample(prose.held_out)],
        "code": [{"text": text.text} for text in sample(code.held_out)],
        "arithmetic": [{"prompt": problem.prompt, "response": problem.response} for problem in held_out_problems],
    }
    write_data(options.out / "data", held_out)
    if options.data_only:
        return

    say("training the tokenizer")
    plain = {"prose": [text.text for text in prose.train], "code": [text.text for text in code.train]}
    tokenizer = train_tokenizer(text for name in plain for text in first(plain[name], TOKENIZER_CHARACTERS[name]))
    folder = options.out / MODEL_NAME
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)

    streams = {
        "prose": stream(tokenizer, [in_turns(tokenizer, text) or text.text for text in shuffled(prose.train)]),
        "code": stream(tokenizer, [text.text for text in shuffled(code.train)]),
        "arithmetic": stream(tokenizer, problem_texts(tokenizer, known)),
    }
    for name, ids in streams.items():
        say(f"{name}: {len(ids):,} training tokens")
    evaluated = {
        "prose": stream(tokenizer, [record["text"] for record in held_out["prose"]]),
        "code": stream(tokenizer, [record["text"] for record in held_out["code"]]),
        "arithmetic": stream(
            tokenizer, [chat(tokenizer, record["prompt"], record["response"]) for record in held_out["arithmetic"]]
        ),
    }
    plan = replace(Plan(mixture=MIXTURE), steps=options.steps)
    config = tiny_config(len(tokenizer), dict(tokenizer.get_vocab()))
    model = train(config, streams, plan, say)

    say("measuring and storing")
    results: dict[str, object] = {"plan": asdict(plan), "training_tokens": {n: len(ids) for n, ids in streams.items()}}
    results["learnable_nats_per_byte"] = {
        name: figures.learnable_nats_per_byte("\n".join(record.values()) for record in records)
        for name, records in held_out.items()
    }
    results["unrounded"] = measure(model, tokenizer, evaluated)
    with rounded_experts(model):
        results["experts_rounded"] = measure(model, tokenizer, evaluated)
    checkpoint.save(model, config, folder)
    results["stored"] = measure(checkpoint.load_dense(folder), tokenizer, evaluated)
    print(json.dumps(results, indent=2))


def write_arithmetic() -> tuple[list[word_problems.Problem], list[word_problems.Problem]]:
    """Problems for the base to train on, and the held-out ones of every kind; no question is in both."""
    held_out = list(word_problems.write_problems(SCENARIOS, HELD_OUT_PROBLEMS, Random(1)))
    avoid = {problem.prompt for problem in held_out}
    known = list(word_problems.write_problems(KNOWN_SCENARIOS, KNOWN_PROBLEMS, Random(2), avoid))
    Random(3).shuffle(held_out)
    return known, held_out


def write_data(folder: Path, held_out: dict[str, list[Record]]) -> None:
    """One jsonl file per set."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in held_out.items():
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        say(f"{name}: {len(records):,} held-out records, {len(lines.encode()):,} bytes")


def sample(texts: Iterable[corpus.Text]) -> list[corpus.Text]:
    """Texts in an order that depends on nothing but their words, as many as the data set and each group may hold."""
    kept: list[corpus.Text] = []
    bytes_of: Counter[str] = Counter()
    for text in shuffled(texts):
        size = len(json.dumps({"text": text.text}, ensure_ascii=False).encode()) + 1
        if bytes_of.total() + size <= HELD_OUT_BYTES and bytes_of[text.group] + size <= GROUP_BYTES:
            bytes_of[text.group] += size
            kept.append(text)
    return kept


def shuffled(texts: Iterable[corpus.Text]) -> list[corpus.Text]:
    return sorted(texts, key=lambda text: hashlib.sha256(text.text.encode()).digest())


def first(texts: list[str], characters: int) -> list[str]:
    """Evenly spaced texts of about `characters` in all."""
    step = max(1, round(sum(map(len, texts)) / characters))
    return texts[::step]


def in_turns(tokenizer: PreTrainedTokenizerFast, text: corpus.Text) -> str | None:
    """A fifth of the documentation as an exchange about its subject, so that the base knows the turn format."""
    if hashlib.sha256(text.text.encode()).digest()[-1] >= CHAT_SHARE * 256:
        return None
    explanation = text.text.removeprefix(text.title).lstrip("\n")
    return chat(tokenizer, f"Explain {text.title}.", explanation)


def problem_texts(tokenizer: PreTrainedTokenizerFast, problems: list[word_problems.Problem]) -> list[str]:
    """Half of the problems as exchanges, half as plain text."""
    return [
        chat(tokenizer, problem.prompt, problem.response) if number % 2 else f"{problem.prompt}\n{problem.response}"
        for number, problem in enumerate(problems)
    ]


def stream(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Tensor:
    """Token ids (T,) of all texts, each followed by <|endoftext|>."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text, add_special_tokens=False), tokenizer.pad_token_id]
    return torch.tensor(ids)


def measure(
    model: GptOssForCausalLM, tokenizer: PreTrainedTokenizerFast, evaluated: dict[str, Tensor]
) -> dict[str, object]:
    """Held-out losses per set, and the use of experts over all sets together."""
    windows = {name: figures.windows(ids, Plan.sequence_length, WINDOWS_PER_SET) for name, ids in evaluated.items()}
    lengths = byte_lengths(tokenizer)
    losses = {name: asdict(figures.held_out_loss(model, part, lengths)) for name, part in windows.items()}
    routed = figures.routing(model, torch.cat(list(windows.values())))
    return {"loss": losses, "routing": [asdict(layer) for layer in routed]}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
