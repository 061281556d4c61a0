"""Forward passes of one model as student and as teacher, giving the losses their signals.

The vocabulary is the widest thing in a step, so the output head reads only the tokens that a loss looks at: the
student's learnt and kept tokens, the teacher's kept ones.

    # B sequences, S tokens each; N targets that count, D hidden size, V vocabulary
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nexus_core.additions import as_teacher
from nexus_core.data.mixture import Batch
from nexus_core.data.packing import IGNORED
from nexus_core.distill.signals import (
    KEPT_LOGITS,
    LEARNT_LOGITS,
    TEACHER_LOGITS,
    TEACHER_ROUTER_LOGITS,
    Signals,
    TokenCounts,
)
from nexus_core.statistics.listening import Listener


@dataclass(frozen=True)
class MicroBatch:
    """A batch on its device: input_ids (B, S), and targets (B * S,) with the places in it of three kinds of token.

    text: all but padding; learnt, kept: targets that count, of sets to learn from and sets to keep.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    text: torch.Tensor
    learnt: torch.Tensor
    kept: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, learnt: Collection[str], device: str | torch.device) -> MicroBatch:
        """From a batch of the data; learnt: names of the data sets to learn from."""
        positions_S = torch.arange(batch.input_ids.shape[1])
        is_text_BS = positions_S < batch.lengths[:, None]
        counts_BS = batch.targets != IGNORED
        is_learnt_B1 = torch.tensor([[name in learnt] for name in batch.set_names])
        kinds = (is_text_BS, counts_BS & is_learnt_B1, counts_BS & ~is_learnt_B1)
        places = [kind.flatten().nonzero().flatten().to(device) for kind in kinds]
        return cls(batch.input_ids.to(device), batch.targets.flatten().to(device), *places)


def count_tokens(micro_batches: Sequence[MicroBatch]) -> TokenCounts:
    """The tokens of a whole optimizer step."""
    return TokenCounts(
        learnt=sum(len(micro_batch.learnt) for micro_batch in micro_batches),
        kept=sum(len(micro_batch.kept) for micro_batch in micro_batches),
        text=sum(len(micro_batch.text) for micro_batch in micro_batches),
    )


def read_signals(
    model: nn.Module,
    listener: Listener,
    micro_batch: MicroBatch,
    needs: Collection[str],
    step_tokens: TokenCounts,
    temperature: float,
) -> Signals:
    """One student pass, with its graph, and one teacher pass without if `needs` asks for anything of it.

    needs: what the run's losses need, see `nexus_core.distill.signals`. listener: listening to the model.
    """
    nothing = micro_batch.text[:0]
    learnt = micro_batch.learnt if LEARNT_LOGITS in needs else nothing
    kept = micro_batch.kept if KEPT_LOGITS in needs else nothing
    taught = micro_batch.kept if TEACHER_LOGITS in needs else nothing

    teacher_logits: torch.Tensor | None = None
    teacher_routers: tuple[torch.Tensor, ...] = ()
    if TEACHER_ROUTER_LOGITS in needs or len(taught):
        with torch.no_grad(), as_teacher(model):
            teacher_logits = _logits(model, micro_batch.input_ids, taught)
            teacher_routers = _router_logits(listener, micro_batch.text)
    logits_NV = _logits(model, micro_batch.input_ids, torch.cat([learnt, kept]))
    learnt_logits, kept_logits = logits_NV.split([len(learnt), len(kept)])
    return Signals(
        learnt_logits=learnt_logits,
        learnt_targets=micro_batch.targets[learnt],
        kept_logits=kept_logits,
        teacher_logits=kept_logits.detach()[:0] if teacher_logits is None else teacher_logits,
        router_logits=_router_logits(listener, micro_batch.text),
        teacher_router_logits=teacher_routers,
        step_tokens=step_tokens,
        temperature=temperature,
    )


def _logits(model: nn.Module, input_ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Logits (len(places), V) of some tokens of the flattened batch."""
    with _head_reads(model, places):
        return model(input_ids=input_ids, use_cache=False).logits[0]


@contextmanager
def _head_reads(model: Any, places: torch.Tensor) -> Iterator[None]:
    """Within this context the output head sees hidden states (1, len(places), D) instead of (B, S, D)."""

    def choose(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        (hidden_BSD,) = arguments
        return (hidden_BSD.flatten(0, -2)[places].unsqueeze(0),)

    handle = model.get_output_embeddings().register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def _router_logits(listener: Listener, places: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(listener.routers[layer].logits.flatten(0, -2)[places] for layer in sorted(listener.routers))
