"""One pass of a teacher over sequences, what is stored of it, and what storing lost.

# B sequences, S tokens each, K kept tokens of one sequence, T tokens of its text, L layers, E experts
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import torch

from nexus_core.data.isolation import isolates_documents, position_arguments
from nexus_core.data.packing import IGNORED, PackedSequences
from nexus_core.distill import stored_logits, stored_routers
from nexus_core.distill.router_kl import kl_sum
from nexus_core.distill.stored_logits import StorageError, StoredLogits, TopLogits
from nexus_core.distill.stored_routers import StoredRouters
from nexus_core.distill.teachers import log_probabilities
from nexus_core.distill.vocabulary import CHUNK_ELEMENTS
from nexus_core.recipe.training import Train
from nexus_core.statistics.listening import Listener
from nexus_core.train.passes import final_hidden, output_head

# Ends of streams of bits are rounded up to bytes, three times a sequence.
ROUNDING_BYTES = 3


class TeacherPass:
    """Runs the teacher over sequences and gives what is stored of them."""

    def __init__(self, model: Any, listener: Listener, settings: Train, vocabulary_size: int):
        self.model, self.listener, self.settings = model, listener, settings
        self.head = output_head(model).first_tokens(vocabulary_size)
        self.isolates = isolates_documents(model)
        elements = CHUNK_ELEMENTS.get(self.head.weight.device.type, CHUNK_ELEMENTS["cpu"])
        self.rows = max(1, elements // self.head.vocabulary_size)

    def read(
        self, packed: PackedSequences, numbers: range, is_kept: bool, totals: Totals
    ) -> tuple[list[StoredLogits], list[StoredRouters]]:
        """Of every sequence what is stored of its predictions, if its set is kept, and of its routers, if wanted."""
        tops: list[TopLogits] = []
        routers: list[StoredRouters] = []
        for start in range(numbers.start, numbers.stop, self.settings.batch_size):
            rows = slice(start, min(start + self.settings.batch_size, numbers.stop))
            inputs = {"input_ids": packed.input_ids[rows], **position_arguments(self.isolates, packed.positions[rows])}
            device = self.head.weight.device
            hidden_TD = final_hidden(self.model, {name: tensor.to(device) for name, tensor in inputs.items()})
            if is_kept:
                tops += self._tops(hidden_TD.unflatten(0, inputs["input_ids"].shape), packed.targets[rows])
            if self.settings.teacher.stores_routers:
                routers += self._routers(packed.lengths[rows].tolist(), totals)
        return self._stored(tops, totals) if tops else [], routers

    def _tops(self, hidden_BSD: torch.Tensor, targets_BS: torch.Tensor) -> list[TopLogits]:
        teacher, found = self.settings.teacher, []
        for hidden_SD, targets_S in zip(hidden_BSD, targets_BS, strict=True):
            hidden_KD = hidden_SD[(targets_S != IGNORED).to(hidden_SD.device)]
            parts = [
                stored_logits.choose(
                    log_probabilities(hidden_CD, self.head, 1.0), limit=teacher.top_logits, tail=teacher.tail
                )
                for hidden_CD in hidden_KD.split(self.rows)
            ]
            found.append(stored_logits.joined(parts))
        return found

    def _stored(self, tops: list[TopLogits], totals: Totals) -> list[StoredLogits]:
        """Of a chunk's sequences as many ids as there is room for, and what storing them lost."""
        size, ends = self.head.vocabulary_size, [len(top.counts) for top in tops]
        tokens = max(sum(ends), 1)
        room = self.settings.teacher.bytes_per_token - ROUNDING_BYTES * len(tops) / tokens
        fitted = stored_logits.fitted(stored_logits.joined(tops), size, room)
        stored = [stored_logits.encode(part, size) for part in stored_logits.separated(fitted, ends)]
        error = stored_logits.storage_error(fitted, stored_logits.decode(stored, size))
        totals.add_logits(sum(ends), sum(part.stored_bytes for part in stored), error)
        return stored

    def _routers(self, lengths: list[int], totals: Totals) -> list[StoredRouters]:
        layers = [self.listener.routers[layer].logits.float() for layer in self.listener.layers]
        logits_BSLE = torch.stack(layers, dim=-2).flatten(0, -3).unflatten(0, (len(lengths), -1))
        found = []
        for logits_SLE, length in zip(logits_BSLE, lengths, strict=True):
            stored = stored_routers.encode(logits_SLE[:length])
            back_TLE = stored_routers.decode(stored)
            kl = float(kl_sum(back_TLE.flatten(0, 1), logits_SLE[:length].flatten(0, 1), 1.0)) / len(layers)
            totals.add_routers(length, stored.stored_bytes, kl)
            found.append(StoredRouters(stored.levels.cpu(), stored.steps.cpu()))
        return found


class Totals:
    """What was stored, and what storing lost: sums over tokens by name, which add up over chunks."""

    def __init__(self) -> None:
        self.sums: Counter[str] = Counter()

    def add_logits(self, tokens: int, stored_bytes: int, error: StorageError) -> None:
        lost = {name: value * tokens for name, value in asdict(error).items()}
        self.sums.update({"kept_tokens": tokens, "logits_bytes": stored_bytes, **lost})

    def add_routers(self, tokens: int, stored_bytes: int, kl_nats: float) -> None:
        self.sums.update({"text_tokens": tokens, "router_bytes": stored_bytes, "router_kl_nats": kl_nats})

    def metrics(self) -> dict[str, float]:
        """Means per token."""
        sums = self.sums
        metrics: dict[str, float] = {}
        if sums["kept_tokens"]:
            names = {
                "logits_bytes": "vocabulary_bytes_per_token",
                "kl_nats": "vocabulary_kl_nats",
                "total_variation": "vocabulary_total_variation",
                "tail": "tail_mass",
                "ids": "ids_per_token",
            }
            metrics |= {"kept_tokens": sums["kept_tokens"]}
            metrics |= {name: sums[part] / sums["kept_tokens"] for part, name in names.items()}
        if sums["text_tokens"]:
            metrics |= {
                "text_tokens": sums["text_tokens"],
                "router_bytes_per_token": sums["router_bytes"] / sums["text_tokens"],
                "stored_router_kl_nats": sums["router_kl_nats"] / sums["text_tokens"],
            }
        return metrics
