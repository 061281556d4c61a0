"""A stored teacher in the place of the teacher's pass: the same answers, read instead of computed."""

from __future__ import annotations

from collections.abc import Collection

import torch

from nexus_core.distill import stored_logits
from nexus_core.distill.signals import TEACHER, TEACHER_ROUTER_LOGITS
from nexus_core.distill.teachers import Teacher
from nexus_core.train.passes import MicroBatch, Taught
from nexus_core.train.teacher_store import TeacherStore


class OfflineTeacher:
    """Answers from a store that was captured of just these sequences. learnt: names of the sets to learn from."""

    def __init__(self, store: TeacherStore, learnt: Collection[str], device: str | torch.device):
        self.store, self.learnt, self.device = store, frozenset(learnt), device

    def teach(self, micro_batch: MicroBatch, needs: Collection[str]) -> Taught:
        """What is asked for of the micro-batch's kept tokens and text, in their order."""
        teacher: Teacher | None = None
        routers: tuple[torch.Tensor, ...] = ()
        if TEACHER in needs:
            kept = [self.store.logits(name, sequence) for name, sequence in micro_batch.rows if name not in self.learnt]
            if kept:
                teacher = stored_logits.decode(kept, self.store.vocabulary_size, self.device)
            else:
                teacher = stored_logits.nothing(self.device)
        if TEACHER_ROUTER_LOGITS in needs:
            rows = [self.store.routers(name, sequence) for name, sequence in micro_batch.rows]
            # A micro-batch without rows of the data: another process has more of them.
            parts = rows or [self.store.no_routers()]
            routers = tuple(torch.cat(parts).to(self.device).unbind(dim=1))
        return Taught(teacher, None, routers)
