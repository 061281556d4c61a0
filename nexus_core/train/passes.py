"""Forward passes of one model as student and as teacher, giving the losses their signals.

The vocabulary is the widest thing in a step, so no pass computes logits: the losses get the final hidden states of the
tokens they look at, and apply the output head to a few of them at a time.

    # B sequences, S tokens each; N targets that count, D hidden size, E experts
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from nexus_core.additions import as_teacher
from nexus_core.data.isolation import position_arguments
from nexus_core.data.mixture import Batch
from nexus_core.data.packing import IGNORED
from nexus_core.distill.head import OutputHead
from nexus_core.distill.signals import (
    KEPT_HIDDEN,
    LEARNT_HIDDEN,
    OF_THE_TEACHER,
    TEACHER,
    TEACHER_HIDDEN,
    Signals,
    TokenCounts,
)
from nexus_core.distill.teachers import Teacher, WholeTeacher
from nexus_core.errors import TrainingError
from nexus_core.statistics.listening import Listener

# How many tokens show that the output head gives the model's logits, and how far they may differ: the rounding of
# bfloat16, no more.
HEAD_TOKENS = 8
HEAD_TOLERANCE = 0.02


@dataclass(frozen=True)
class MicroBatch:
    """A batch on its device: input_ids (B, S), and targets (B * S,) with the places in it of three kinds of token.

    text: all but padding; learnt, kept: targets that count, of sets to learn from and sets to keep. inputs: what the
    model's forward pass takes, input_ids among them. rows: of every row its data set, and which of that set's
    sequences it is.
    """

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor
    text: torch.Tensor
    learnt: torch.Tensor
    kept: torch.Tensor
    rows: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(
        cls, batch: Batch, learnt: Collection[str], device: str | torch.device, *, isolates: bool = False
    ) -> MicroBatch:
        """From a batch of the data; learnt: names of the data sets to learn from. isolates: whether the model keeps
        packed documents apart, see `nexus_core.data.isolation`.
        """
        positions_S = torch.arange(batch.input_ids.shape[1])
        is_text_BS = positions_S < batch.lengths[:, None]
        counts_BS = batch.targets != IGNORED
        is_learnt_B1 = torch.tensor([[name in learnt] for name in batch.set_names])
        kinds = (is_text_BS, counts_BS & is_learnt_B1, counts_BS & ~is_learnt_B1)
        text, learnt_places, kept = (kind.flatten().nonzero().flatten().to(device) for kind in kinds)
        given = {"input_ids": batch.input_ids, **position_arguments(isolates, batch.positions)}
        inputs = {name: tensor.to(device) for name, tensor in given.items()}
        rows = tuple(zip(batch.set_names, batch.places, strict=False))
        return cls(inputs, batch.targets.flatten().to(device), text, learnt_places, kept, rows)

    @property
    def input_ids(self) -> torch.Tensor:
        return self.inputs["input_ids"]


def count_tokens(micro_batches: Sequence[MicroBatch]) -> TokenCounts:
    """The tokens of a whole optimizer step."""
    return TokenCounts(
        learnt=sum(len(micro_batch.learnt) for micro_batch in micro_batches),
        kept=sum(len(micro_batch.kept) for micro_batch in micro_batches),
        text=sum(len(micro_batch.text) for micro_batch in micro_batches),
    )


@dataclass(frozen=True)
class Taught:
    """What a teacher says of one micro-batch: of its kept tokens, and of its text by layer. Nothing if not asked."""

    teacher: Teacher | None = None
    hidden: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] = ()


class TeacherSource(Protocol):
    """Where a teacher's answers come from: the same weights (below), or a store of them."""

    def teach(self, micro_batch: MicroBatch, needs: Collection[str]) -> Taught: ...


class OnlineTeacher:
    """The model itself with its additions off: no second copy, one more forward pass."""

    def __init__(self, model: nn.Module, listener: Listener, head: OutputHead):
        self.model, self.listener, self.head = model, listener, head

    def teach(self, micro_batch: MicroBatch, needs: Collection[str]) -> Taught:
        """No pass if `needs` asks for nothing of the teacher, or only for kept tokens and there are none."""
        kept = micro_batch.kept if TEACHER in needs or TEACHER_HIDDEN in needs else micro_batch.kept[:0]
        if not (len(kept) or OF_THE_TEACHER.intersection(needs) - {TEACHER, TEACHER_HIDDEN}):
            hidden_KD = self.head.weight.new_zeros(0, self.head.weight.shape[1])
            return Taught(WholeTeacher(hidden_KD, self.head), hidden_KD)
        with torch.no_grad(), as_teacher(self.model):
            hidden_KD = final_hidden(self.model, micro_batch.inputs)[kept]
        return Taught(WholeTeacher(hidden_KD, self.head), hidden_KD, _router_logits(self.listener, micro_batch.text))


def read_signals(
    model: nn.Module,
    head: OutputHead,
    listener: Listener,
    source: TeacherSource,
    micro_batch: MicroBatch,
    needs: Collection[str],
    step_tokens: TokenCounts,
    temperature: float,
) -> Signals:
    """One student pass, with its graph, and what the teacher says.

    needs: what the run's losses need, see `nexus_core.distill.signals`. listener: listening to the model.
    """
    nothing = micro_batch.text[:0]
    learnt = micro_batch.learnt if LEARNT_HIDDEN in needs else nothing
    kept = micro_batch.kept if KEPT_HIDDEN in needs else nothing
    # The teacher first: what the listener hears last is the student.
    taught = source.teach(micro_batch, needs)
    hidden_TD = final_hidden(model, micro_batch.inputs)
    return Signals(
        head=head,
        learnt_hidden=hidden_TD[learnt],
        learnt_targets=micro_batch.targets[learnt],
        kept_hidden=hidden_TD[kept],
        teacher=taught.teacher,
        teacher_hidden=taught.hidden,
        router_logits=_router_logits(listener, micro_batch.text),
        teacher_router_logits=taught.router_logits,
        step_tokens=step_tokens,
        temperature=temperature,
    )


def final_hidden(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the output head reads (B * S, D): the decoder's last hidden states, after its final norm."""
    return model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, -2)


def output_head(model: Any) -> OutputHead:
    """The model's output head, found and tried. Raises TrainingError as `refuse_other_head`."""
    head = find_output_head(model)
    refuse_other_head(model, head)
    return head


def find_output_head(model: Any) -> OutputHead:
    """The model's output head by transformers' conventions; it shares the model's numbers."""
    linear = model.get_output_embeddings()
    scaling = getattr(model.config, "logits_scaling", None)
    bias = getattr(linear, "bias", None)
    return OutputHead(
        linear.weight.detach(), None if bias is None else bias.detach(), 1.0 if scaling is None else 1.0 / scaling
    )


@torch.no_grad()
def refuse_other_head(model: Any, head: OutputHead) -> None:
    """Try the head on a few tokens. Raises TrainingError if its logits are not the model's: such a family does more to
    them than the conventions say.
    """
    input_ids = torch.arange(HEAD_TOKENS, device=head.weight.device)[None] % head.vocabulary_size
    expected = model(input_ids=input_ids, use_cache=False).logits[0].float()
    found = head.logits(final_hidden(model, {"input_ids": input_ids})).float()
    # A checkpoint that is damaged has no finite logits; the first step says so.
    if expected.isfinite().all() and (found - expected).abs().max() > HEAD_TOLERANCE * expected.abs().max():
        raise TrainingError(
            f"the logits of a {type(model).__name__} are not its output head's of its last hidden states, as they are "
            "in other families, so losses over the vocabulary would be wrong; this family cannot be trained yet"
        )


def _router_logits(listener: Listener, places: torch.Tensor) -> tuple[torch.Tensor, ...]:
    whole = [listener.routers[layer].logits.flatten(0, -2) for layer in sorted(listener.routers)]
    # Full sequences, the usual ones, need no copy: that of 36 layers of 128 experts is 75 MB for 8,192 tokens.
    return tuple(logits if len(places) == len(logits) else logits[places] for logits in whole)
