"""Batches from several data sets: shares, random access, order."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from nexus_core.data.mixture import TrainingBatches
from nexus_core.data.packing import PackedSequences
from nexus_core.errors import DataError


def sequences(count: int, first: int) -> PackedSequences:
    ids = torch.arange(first, first + count)[:, None].expand(count, 4).clone()
    return PackedSequences(ids, ids + 1, ids % 4, torch.full((count,), 4))


SETS = {"domain": sequences(7, 0), "general": sequences(50, 1_000), "other": sequences(20, 2_000)}


def test_shares_hold_after_every_batch():
    shares = {"domain": 0.6, "general": 0.3, "other": 0.1}
    batches = TrainingBatches(SETS, shares, batch_size=2, seed=0)
    drawn: Counter[str] = Counter()
    for index in range(300):
        drawn.update(batches.batch(index).set_names)
        for name, share in shares.items():
            assert abs(drawn[name] - share * drawn.total()) <= 1 + 1e-9


def test_three_to_one_is_met_exactly_in_every_four_rows():
    batches = TrainingBatches(SETS, {"domain": 3.0, "general": 1.0}, batch_size=4, seed=0)
    for index in range(50):
        assert Counter(batches.batch(index).set_names) == {"domain": 3, "general": 1}


def test_a_batch_depends_on_its_number_alone():
    shares = {"domain": 0.5, "general": 0.25, "other": 0.25}
    in_order = TrainingBatches(SETS, shares, batch_size=3, seed=5)
    expected = [in_order.batch(index) for index in range(60)]
    resumed = TrainingBatches(SETS, shares, batch_size=3, seed=5)
    for index in (59, 3, 40, 0, 58):
        batch = resumed.batch(index)
        assert batch.set_names == expected[index].set_names
        assert torch.equal(batch.input_ids, expected[index].input_ids)
        assert torch.equal(batch.targets, expected[index].targets)


def test_every_sequence_comes_once_per_round_and_each_round_in_another_order():
    batches = TrainingBatches({"domain": SETS["domain"]}, {"domain": 1.0}, batch_size=7, seed=1)
    rounds = [batches.batch(index).input_ids[:, 0].tolist() for index in range(4)]
    assert all(sorted(order) == list(range(7)) for order in rounds)
    assert len({tuple(order) for order in rounds}) == 4
    other_seed = TrainingBatches({"domain": SETS["domain"]}, {"domain": 1.0}, batch_size=7, seed=2)
    assert other_seed.batch(0).input_ids[:, 0].tolist() != rounds[0]


def test_rows_belong_together():
    batch = TrainingBatches(SETS, {"general": 1.0}, batch_size=5, seed=0).batch(3)
    assert batch.input_ids.shape == batch.targets.shape == (5, 4)
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
    assert torch.equal(batch.targets, batch.input_ids + 1)
    assert batch.lengths.tolist() == [4] * 5
    assert np.all(batch.input_ids.numpy() >= 1_000)


def test_unknown_sets_and_no_shares_are_refused():
    with pytest.raises(DataError, match="no data set 'domian'; did you mean 'domain'"):
        TrainingBatches(SETS, {"domian": 1.0}, 1, 0)
    with pytest.raises(DataError, match="no data set has a share"):
        TrainingBatches(SETS, {}, 1, 0)
