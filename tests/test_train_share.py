"""How a step is dealt out to several processes, and which modules stage 3 gathers as one."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nexus_core.additions import SharedExpert
from nexus_core.data.mixture import Batch
from nexus_core.processes import World
from nexus_core.recipe.schema import DeepSpeed
from nexus_core.train.engines import is_cut
from nexus_core.train.engines.deepspeed_library import _meet_nobody, leaf_modules
from nexus_core.train.passes import MicroBatch, count_tokens
from nexus_core.train.share import share_of
from nexus_core.types import MoeBlock


def step(batches: int, rows: int) -> list[Batch]:
    """Batches whose rows are numbered through: in tokens, places and the names of their sets."""
    numbers = torch.arange(batches * rows).view(batches, rows)
    return [
        Batch(
            row_numbers[:, None].expand(-1, 4),
            row_numbers[:, None].expand(-1, 4),
            torch.arange(4).expand(rows, -1),
            torch.full((rows,), 4),
            [f"set {int(number) % 2}" for number in row_numbers],
            row_numbers.tolist(),
        )
        for row_numbers in numbers
    ]


@pytest.mark.parametrize(
    ("batches", "rows", "size"), [(4, 2, 2), (3, 1, 2), (1, 8, 3), (3, 2, 4), (5, 3, 7), (1, 2, 2)]
)
def test_every_row_is_dealt_out_once_and_passes_are_as_many_everywhere(batches: int, rows: int, size: int) -> None:
    given = step(batches, rows)
    shares = [share_of(given, rank, size) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    assert all(1 <= len(batch.lengths) <= rows for share in shares for batch in share)
    parts = [batch for share in shares for batch in share if batch.lengths.sum()]
    places = [place for batch in parts for place in batch.places]
    assert places == list(range(batches * rows))
    for batch in parts:
        assert batch.input_ids[:, 0].tolist() == batch.places
        assert batch.set_names == [f"set {place % 2}" for place in batch.places]
    counts = [sum(int(batch.lengths.count_nonzero()) for batch in share) for share in shares]
    assert max(counts) - min(counts) <= 1


def test_one_process_gets_the_batches_as_they_are() -> None:
    given = step(3, 2)
    assert all(ours is theirs for ours, theirs in zip(share_of(given, 0, 1), given, strict=True))


def test_in_a_row_that_fills_up_nothing_counts() -> None:
    filled = share_of(step(3, 1), 1, 2)[1]
    micro_batch = MicroBatch.of(filled, {"set 0", "set 1"}, "cpu")
    assert len(micro_batch.input_ids) == 1
    assert micro_batch.rows == ()
    counts = count_tokens([micro_batch])
    assert (counts.learnt, counts.kept, counts.text) == (0, 0, 0)


@pytest.mark.parametrize(
    ("settings", "size", "cut"),
    [
        (None, 2, False),
        (DeepSpeed(zero_stage=0), 2, False),
        (DeepSpeed(zero_stage=1), 2, True),
        (DeepSpeed(zero_stage=3), 1, False),
        (DeepSpeed(zero_stage=2, offload="optimizer"), 1, True),
    ],
)
def test_deepspeed_is_used_where_something_is_cut_or_offloaded(settings, size: int, cut: bool) -> None:
    assert is_cut(settings, World(0, size, 0)) is cut


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))


def block_with(experts: nn.Module) -> nn.Module:
    block = nn.Module()
    block.router, block.experts = nn.Linear(2, 2), experts
    block.shared_expert = SharedExpert(2, 2, lambda gate, up: gate * up, has_bias=False)
    return block


@pytest.mark.parametrize("is_list", [False, True])
def test_what_holds_the_experts_is_gathered_as_one(is_list: bool) -> None:
    block = block_with(nn.ModuleList([Experts(), Experts()]) if is_list else Experts())
    hook = SimpleNamespace(nexus_moe_blocks=lambda model: [MoeBlock(0, block, block.router)])
    leaves = leaf_modules(nn.Module(), SimpleNamespace(hook=hook))
    # A list of experts is never called, so nothing could be gathered for it.
    assert leaves == [block if is_list else block.experts]


def test_alone_deepspeed_computes_on_the_gpu_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "of nobody")
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *arguments, **keywords: None)
    _meet_nobody(torch.device("cuda:1"))
    assert os.environ["LOCAL_RANK"] == "1"
