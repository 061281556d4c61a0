"""Held-out text during training: how well the student and its base predict it, and which state of the run is best.

# B sequences, S tokens each
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from nexus_core.additions import as_teacher
from nexus_core.data.isolation import position_arguments
from nexus_core.data.packing import IGNORED, PackedSequences
from nexus_core.distill.head import OutputHead
from nexus_core.distill.vocabulary import cross_entropy_sum
from nexus_core.processes import sum_in_place, world
from nexus_core.train.passes import final_hidden

# Names of the values in metrics.jsonl; each is followed by the data set's.
HELD_OUT, HELD_OUT_BASE = "held_out/", "held_out_base/"
SCORE = "held_out_score"


class HeldOut:
    """Measures a model on held-out sequences by data set name. The base is measured once, at the first call."""

    def __init__(
        self,
        sets: Mapping[str, PackedSequences],
        batch_size: int,
        learnt: Collection[str],
        retention_weight: float,
    ):
        self.sets, self.batch_size = sets, batch_size
        self.learnt, self.retention_weight = frozenset(learnt), retention_weight
        self._base: dict[str, float] | None = None

    def measure(self, model: nn.Module, head: OutputHead, *, isolates: bool = False) -> dict[str, float]:
        """Nats per token of every set by student and base, and the score, lower being better.

        The score is what the run is for: the mean of the learnt sets, plus retention_weight times how much worse than
        the base the kept sets became on average; a kept set that became better does not count. isolates: whether the
        model keeps packed documents apart. Of several processes each runs some of the batches; the values are over all.
        """
        if self._base is None:
            with as_teacher(model):
                self._base = self._nats_per_token(model, head, isolates)
        student = self._nats_per_token(model, head, isolates)
        gained = [value for name, value in student.items() if name in self.learnt]
        lost = [max(0.0, value - self._base[name]) for name, value in student.items() if name not in self.learnt]
        score = sum(gained) / max(len(gained), 1) + self.retention_weight * sum(lost) / max(len(lost), 1)
        values = {f"{HELD_OUT}{name}": value for name, value in student.items()}
        return values | {f"{HELD_OUT_BASE}{name}": value for name, value in self._base.items()} | {SCORE: score}

    @torch.no_grad()
    def _nats_per_token(self, model: nn.Module, head: OutputHead, isolates: bool) -> dict[str, float]:
        return {name: self._mean(model, head, packed, isolates) for name, packed in self.sets.items()}

    def _mean(self, model: nn.Module, head: OutputHead, packed: PackedSequences, isolates: bool) -> float:
        total, device, here = 0.0, head.weight.device, world()
        starts = range(0, len(packed), self.batch_size)
        for number in range(here.rank, -(-len(starts) // here.size) * here.size, here.size):
            # Sharded models run a pass on all processes or on none, so one that has no batch left repeats the last.
            is_ours, start = number < len(starts), starts[min(number, len(starts) - 1)]
            rows = slice(start, start + self.batch_size)
            targets = packed.targets[rows].flatten().to(device)
            places = (targets != IGNORED).nonzero().flatten() if is_ours else targets.new_empty(0)
            inputs = {"input_ids": packed.input_ids[rows], **position_arguments(isolates, packed.positions[rows])}
            hidden_TD = final_hidden(model, {name: ids.to(device) for name, ids in inputs.items()})[places]
            total += float(cross_entropy_sum(hidden_TD, targets[places], head))
        total = float(sum_in_place(torch.tensor(total, dtype=torch.float64)))
        return total / max(packed.learnt_tokens, 1)


@dataclass
class Best:
    """The best state so far, and how many evaluations ago it was; patience: how many may pass without a better one."""

    step: int = -1
    score: float = float("inf")
    evaluations_since: int = 0

    def take(self, step: int, score: float) -> bool:
        """Count an evaluation; returns whether it is the best."""
        if score < self.score:
            self.step, self.score, self.evaluations_since = step, score, 0
            return True
        self.evaluations_since += 1
        return False

    def as_record(self) -> dict[str, Any]:
        """For a checkpoint's position; JSON has no infinity."""
        return asdict(self) if self.step >= 0 else {}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Best:
        """What `as_record` gave."""
        return cls(**record)
