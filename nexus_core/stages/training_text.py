"""The text of a training run as sequences: what is trained on, which capture reads too, and what is held out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from nexus_core.data.documents import documents
from nexus_core.data.packing import PackedSequences, pack
from nexus_core.data.tokenizers import end_token_id, load_tokenizer
from nexus_core.recipe.schema import Source
from nexus_core.recipe.training import Train


def training_sequences(
    tokenizer_folder: Path, sets: Mapping[str, Sequence[Source]], settings: Train
) -> dict[str, PackedSequences]:
    """The sequences of every set that the run will draw from: no more is read than it will draw."""
    tokenizer = load_tokenizer(tokenizer_folder)
    end_token = end_token_id(tokenizer)
    shares = shares_of(sets, settings)
    packed = {}
    for name, sources in sets.items():
        own_rows = math.ceil(drawn_sequences(settings) * shares[name] / sum(shares.values())) + 1
        found = documents(
            sources,
            "train",
            tokenizer,
            limit_tokens=own_rows * settings.sequence_length,
            seed=settings.seed,
            repeat=True,
        )
        packed[name] = pack(found, settings.sequence_length, end_token=end_token)
    return packed


def held_out_sequences(
    tokenizer_folder: Path, sets: Mapping[str, Sequence[Source]], settings: Train
) -> dict[str, PackedSequences]:
    """Of every set the first `settings.evaluate.sequences` held-out sequences, those that `validate` begins with."""
    tokenizer = load_tokenizer(tokenizer_folder)
    end_token = end_token_id(tokenizer)
    tokens = settings.evaluate.sequences * settings.sequence_length
    return {
        name: pack(
            documents(sources, "held_out", tokenizer, limit_tokens=tokens),
            settings.sequence_length,
            end_token=end_token,
            limit_tokens=tokens,
        )
        for name, sources in sets.items()
    }


def shares_of(sets: Mapping[str, Sequence[Source]], settings: Train) -> dict[str, float]:
    """Each set's share of the sequences, by name: `settings.data`, equal if it is None."""
    return {name: settings.data[name] if settings.data else 1.0 for name in sets}


def drawn_sequences(settings: Train) -> int:
    """How many sequences the whole run draws."""
    return settings.max_steps * settings.gradient_accumulation * settings.batch_size
