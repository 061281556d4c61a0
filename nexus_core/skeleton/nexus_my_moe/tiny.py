"""Writes a tiny random checkpoint with a tokenizer, and a little text beside it.

python -m nexus_my_moe.tiny FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nexus_my_moe.base import MyMoeConfig, MyMoeForCausalLM

COLOURS = ("amber", "blue", "crimson", "dun", "ecru", "fawn", "green", "hazel")


def write(folder: Path, seed: int = 0) -> Path:
    """ADAPT: a checkpoint as its publisher would write it, only small. Returns the folder."""
    torch.manual_seed(seed)
    config = MyMoeConfig(initializer_range=0.2, dtype=torch.bfloat16, eos_token_id=0)
    MyMoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    texts = {
        "domain": [f"Sum: {one} + {two} = {one + two}." for one in range(20) for two in range(20)],
        "general": [f"The {one} bird sat by the {two} stone." * 3 for one in COLOURS for two in COLOURS],
    }
    for name, lines in texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
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
