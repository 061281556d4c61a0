"""Writes a tiny random checkpoint with a tokenizer, and a little text beside it.

python -m nexus_toy_moe.tiny FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nexus_toy_moe.base import ToyMoeConfig, ToyMoeForCausalLM

COLOURS = ("amber", "blue", "crimson", "dun", "ecru", "fawn", "green", "hazel")


def write(folder: Path, seed: int = 0) -> Path:
    """A checkpoint as its publisher would write it, only small. Returns the folder."""
    torch.manual_seed(seed)
    config = ToyMoeConfig(initializer_range=0.2, dtype=torch.bfloat16, eos_token_id=0)
    ToyMoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    records = {
        "domain": [{"asked": f"What is {a} + {b}?", "told": f"It is {a + b}."} for a in range(20) for b in range(20)],
        "general": [{"text": f"The {a} bird sat by the {b} stone." * 3} for a in COLOURS for b in COLOURS],
    }
    for name, lines in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after the end of text."""
    pieces = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
