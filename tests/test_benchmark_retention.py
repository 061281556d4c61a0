"""The benchmark of retention: its settings reach the trainings, going on after a kill, and the table."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

# Benchmarks are no part of what is installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import retention
from benchmarks.retention import FILE_NAME, Outcome, read, run, table
from benchmarks.starts.setting import KEPT, Setting, Sizes
from benchmarks.starts.subjects import Retention
from nexus_core.recipe.training import Loss

ROOT = Path(__file__).parents[1]

MINIATURE = Sizes(steps=4, sequence_length=64, batch_size=4, held_out_sequences=2, collected_tokens=512, candidates=50)


def test_weight_share_and_direction_are_what_is_trained_with(tmp_path: Path) -> None:
    settings = Setting(tmp_path, MINIATURE, Retention(2.0, 0.5, "reverse")).settings("arithmetic", 0)
    assert settings.data == {"arithmetic": 0.5, KEPT: 0.5}
    assert settings.loss_weights == {"lm": 1.0, "router_kl": 1.0, "logits_kl": 2.0}
    held = settings.losses["logits_kl"]
    assert isinstance(held, Loss)
    assert held.parameters == {"direction": "reverse"}


def test_what_was_finished_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, free = Retention(weight=16.0), Retention(weight=0.0)
    monkeypatch.setattr(retention, "RETENTIONS", (held, free))
    monkeypatch.setattr(retention, "SEEDS", (0,))
    before = Outcome(held, 0, 0.5, 0.01, 0.02)
    # A second line was cut off by a kill.
    (tmp_path / FILE_NAME).write_text(json.dumps(asdict(before)) + '\n{"retention": {"wei')
    done = read(tmp_path)
    assert done == {(held, 0): before}
    assert (tmp_path / FILE_NAME).read_text() == json.dumps(asdict(before)) + "\n"
    (outcome,) = run(done, tmp_path, MINIATURE)
    assert (outcome.retention, outcome.seed) == (free, 0)
    assert outcome.gain > 0


def test_the_page_shows_what_was_recorded(tmp_path: Path) -> None:
    recorded = ROOT / "benchmarks" / "starts" / "recorded" / FILE_NAME
    shutil.copy(recorded, tmp_path)
    done = read(tmp_path)
    assert len(done) == len(retention.RETENTIONS) * len(retention.SEEDS)
    page = (ROOT / "docs" / "training.md").read_text().splitlines()
    assert [line for line in table(done) if line not in page] == []


def test_table_gives_mean_and_spread_of_what_has_several_seeds() -> None:
    held, free = Retention(weight=4.0), Retention(weight=0.0)
    done = {(held, seed): Outcome(held, seed, 1.0 + 0.1 * seed, 0.02, 0.08) for seed in range(3)}
    lines = table(done | {(free, 0): Outcome(free, 0, 2.0, 1.0, 1.0)})
    assert lines[2:] == ["| 4 | 25% | forward | 1.100 ± 0.100 | 0.020 ± 0.000 | 0.080 ± 0.000 | 22 |"]
