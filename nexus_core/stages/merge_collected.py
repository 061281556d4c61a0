"""Several folders that `collect` wrote, of one model, as one: the same numbers as one pass over all their tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nexus_core.checkpoint.writer import write_json, write_shard
from nexus_core.errors import UsageError
from nexus_core.stages.shards import WHOLE, read_shard
from nexus_core.stages.stage import Metrics
from nexus_core.statistics import kept_inputs, moments, probabilities, saliency
from nexus_core.statistics.moments import RouterStatistics
from nexus_core.statistics.saliency import NeuronSaliency, SaliencyFile

REPORT_NAME = "sampling_report.json"

# What must be the same in all folders, by its name in their metadata.
SAME_IN_ALL = ("family", "layers", "experts", "experts_per_token")


@dataclass(frozen=True)
class _Collected:
    folder: Path
    statistics: RouterStatistics
    metadata: dict[str, Any]

    @property
    def place(self) -> int:
        return read_shard(self.metadata.get("shard", str(WHOLE))).number


def merge_collected(folders: Sequence[Path], out: Path) -> Metrics:
    """Fill `out` with the sums over the tokens of all `folders`, which are of the same model.

    Shards of one pass are put in their order, so that everything is as one pass would have written it, sums to rounding
    in float64. Router probabilities are not copied: they stay where they are. Raises UsageError if the folders are not
    of the same model and kind, or some shards of a pass are missing or given twice.
    """
    if len(folders) < 2:
        raise UsageError("merging takes at least two folders that `nexus collect` wrote")
    parts = sorted((_Collected(folder, *RouterStatistics.load(folder)) for folder in folders), key=lambda p: p.place)
    _refuse_others(parts)
    statistics = reduce(RouterStatistics.merge, (part.statistics for part in parts))
    tokens_per_set: dict[str, int] = {}
    for part in parts:
        for name, tokens in part.metadata["tokens_per_set"].items():
            tokens_per_set[name] = tokens_per_set.get(name, 0) + tokens
    metadata = {**parts[0].metadata, "tokens": statistics.tokens, "tokens_per_set": tokens_per_set}
    metadata.pop("shard", None)
    statistics.save(out / moments.FILE_NAME, metadata)
    if statistics.output_norm_sum is not None:
        merged = reduce(NeuronSaliency.merge, (SaliencyFile(file).load() for file in _files(parts, saliency.FILE_NAME)))
        merged.save(out / saliency.FILE_NAME, metadata)
    kept = [load_file(file) for file in _files(parts, kept_inputs.FILE_NAME)]
    # Of one pass, a short part may have had nothing to keep.
    if len(kept) == len(parts) or (kept and "shard" in parts[0].metadata):
        write_shard(out / kept_inputs.FILE_NAME, {name: torch.cat([each[name] for each in kept]) for name in kept[0]})
    report = {
        "tokens": statistics.tokens,
        "tokens_per_set": tokens_per_set,
        "probabilities": [str(file) for file in _files(parts, probabilities.FILE_NAME)],
        "merged": {str(part.folder): json.loads((part.folder / REPORT_NAME).read_text()) for part in parts},
    }
    write_json(out / REPORT_NAME, report)
    entropy_nats = float(statistics.mean_entropy().mean())
    return {
        "tokens": statistics.tokens,
        "folders": len(parts),
        "router_entropy_nats": entropy_nats,
        "router_entropy_share_of_even": entropy_nats / math.log(max(statistics.experts, 2)),
        "experts_never_chosen": int((statistics.topk_count == 0).sum()),
    }


def _files(parts: Sequence[_Collected], name: str) -> list[Path]:
    return [part.folder / name for part in parts if (part.folder / name).is_file()]


def _refuse_others(parts: Sequence[_Collected]) -> None:
    first = parts[0]
    for part in parts[1:]:
        for what in SAME_IN_ALL:
            one, other = first.metadata.get(what), part.metadata.get(what)
            if one != other:
                raise UsageError(f"{part.folder}: is of another model than {first.folder} ({what} {other}, not {one})")
        if (part.statistics.output_norm_sum is None) != (first.statistics.output_norm_sum is None):
            raise UsageError(f"{first.folder}, {part.folder}: only one has expert norms; collect both the same way")
    shards = [read_shard(part.metadata["shard"]) for part in parts if "shard" in part.metadata]
    if not shards:
        return
    if len(shards) != len(parts):
        raise UsageError("some of these folders are shards of a pass and some are whole; merge the shards first")
    if [shard.number for shard in shards] != list(range(1, shards[0].count + 1)):
        given = ", ".join(map(str, shards))
        raise UsageError(f"the shards {given} are not those of one pass, each once; give all {shards[0].count} of it")
