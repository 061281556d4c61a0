"""Loading that refuses: a transformers model whose checkpoint lacks a tensor, or has one too many, is not built.

transformers fills in random numbers for the first and drops the second, with a table on the log.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from nexus_core.checkpoint.reader import DTYPES, INDEX_NAME, SINGLE_NAME, CheckpointReader
from nexus_core.errors import CheckpointError

NAMES_SHOWN = 5


class StrictlyLoaded:
    """Stands before transformers' class among a model's bases, and makes its from_pretrained strict."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **keywords: Any) -> Any:
        """As transformers', but strict: CheckpointError names tensors that are missing, unknown or misshapen."""
        asked_for_info = keywords.pop("output_loading_info", False)
        is_elsewhere = any(keywords.get(name) for name in ("state_dict", "subfolder", "variant", "gguf_file"))
        source = pretrained_model_name_or_path
        if not is_elsewhere and isinstance(source, str | Path) and (Path(source) / "config.json").is_file():
            cls.refuse_damaged(Path(source), json.loads((Path(source) / "config.json").read_text()))
        keywords["ignore_mismatched_sizes"] = True  # refused below, with the names
        with _without_load_report():
            model, info = super().from_pretrained(source, *arguments, output_loading_info=True, **keywords)  # type: ignore[misc]
        refuse_unless_whole(str(source), info)
        if not is_elsewhere:
            refuse_whole_numbers(model, Path(source))
        return (model, info) if asked_for_info else model

    @classmethod
    def refuse_damaged(cls, folder: Path, config: dict[str, Any]) -> None:
        """Raise CheckpointError for what the headers of a local folder's shards show to be wrong."""


def refuse_unless_whole(source: str, info: dict[str, Any]) -> None:
    """Raise CheckpointError, with names, unless every tensor of the model and of the checkpoint found its other.

    info: what transformers' from_pretrained gives for `output_loading_info=True`.
    """
    misshapen = [f"{name} {list(found)}, not {list(needed)}" for name, found, needed in sorted(info["mismatched_keys"])]
    refuse(source, sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), misshapen)


def refuse_whole_numbers(model: nn.Module, folder: Path) -> None:
    """Raise CheckpointError for tensors that a local folder holds as whole numbers and the model as floating-point
    ones: transformers casts them without a word.
    """
    if not any((folder / name).is_file() for name in (INDEX_NAME, SINGLE_NAME)):
        return
    stored = CheckpointReader(folder).entries
    rounded = [
        f"{name} {stored[name].dtype}, not {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in model.state_dict().items()
        if name in stored and tensor.is_floating_point() and not DTYPES[stored[name].dtype].is_floating_point
    ]
    if rounded:
        raise CheckpointError(
            f"{folder}: its tensors are not of the model's kind of number ({some(sorted(rounded))}); copy, download or "
            "convert the checkpoint again"
        )


def refuse(source: str, missing: list[str], unknown: list[str], misshapen: list[str]) -> None:
    """Raise CheckpointError if any of the three lists names a tensor."""
    problems = [
        f"{what}: {some(names)}"
        for what, names in (
            ("missing tensors", missing),
            ("unknown tensors", unknown),
            ("tensors of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source}: its tensors do not fit its config.json ({'; '.join(problems)}); "
            "copy, download or convert the checkpoint again; or, if you write its plugin, make its names those on disk"
        )


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Silence transformers' table of tensors that did not fit: from_pretrained says the same as an error."""
    log = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    log.addFilter(is_other)
    try:
        yield
    finally:
        log.removeFilter(is_other)
