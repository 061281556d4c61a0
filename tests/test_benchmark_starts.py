"""The benchmark of starts: its plan, going on after a kill, equal parameters, and one miniature training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Benchmarks are no part of what is installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.starts import __main__ as command
from benchmarks.starts import results, table
from benchmarks.starts.conversions import Conversions
from benchmarks.starts.experts import DenseExperts, hold_dense
from benchmarks.starts.plan import LOWER, NEURONS, REPEATED, RESCALED, SEEDS, plan
from benchmarks.starts.setting import DOMAINS, KEPT, UNSEEN, Setting, Sizes
from benchmarks.starts.subjects import Result, Subject, Training
from benchmarks.starts.trainees import ready
from benchmarks.starts.training import train
from nexus_core.models import load

ROOT = Path(__file__).parents[1]

MINIATURE = Sizes(
    steps=8, sequence_length=64, batch_size=4, held_out_sequences=4, collected_tokens=1_024, candidates=50
)

# One expert of the embedded model in each of its four layers.
SHARED_PARAMETERS = 4 * (3 * 64 * 128 + 64 + 64 + 128)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("starts"), MINIATURE)


@pytest.fixture(scope="module")
def conversions(setting: Setting) -> Conversions:
    return Conversions(setting)


def made_up(training: Training, gain: float) -> Result:
    base = {training.domain: 3.0, KEPT: 4.0, UNSEEN: 4.0}
    return Result(training, 1, 1.0, base, base | {training.domain: 3.0 - gain, UNSEEN: 4.01})


def finished(gain: Callable[[Training], float]) -> dict[str, Result]:
    done: dict[str, Result] = {}
    for training in plan(done):
        assert training.key not in done, "planned twice"
        done[training.key] = made_up(training, gain(training))
    return done


def by_rate(training: Training) -> float:
    """As if a rate of 1e-2 were best for everyone, and some seeds better than others."""
    return 1.0 - abs(training.learning_rate - 1e-2) + 0.1 * training.seed + 0.2 * (training.subject == NEURONS)


def test_plan_has_about_150_trainings_and_repeats_the_best_with_every_seed_on_both_domains() -> None:
    done = finished(by_rate)
    assert len(done) <= 165
    for domain in DOMAINS:
        # The mean with longer rows is tried on one domain only.
        repeated = [row for row in table.repeated(done) if row.domain == domain and row.subject != RESCALED]
        assert len(repeated) == 13
        assert all(tuple(result.training.seed for result in row.results) == SEEDS for row in repeated)
        assert set(REPEATED) <= {row.subject for row in repeated}


def test_repetitions_are_at_the_rate_that_the_screen_found_best() -> None:
    best = {"full": 2e-3}
    later = [t.training for t in finished(by_rate).values() if t.training.seed and t.training not in LOWER]
    assert later
    assert all(training.learning_rate == best.get(training.subject.kind, 1e-2) for training in later)


def test_table_gives_mean_spread_and_the_lead_over_the_reference_with_the_same_seeds() -> None:
    rows = {row.subject: row for row in table.repeated(finished(by_rate)) if row.domain == DOMAINS[0]}
    assert rows[NEURONS].mean_spread("gain") == pytest.approx((1.3, 0.1))
    assert rows[NEURONS].lead == pytest.approx(0.2)
    assert rows[NEURONS].lead_spread == pytest.approx(0.0, abs=1e-9)
    line = "| neurons; zero start | 0k | 0.01 | 1.300 ± 0.100 | +0.200 ± 0.000 | 0.005 ± 0.000 |"
    assert line in "\n".join(table.markdown(finished(by_rate)))


def test_the_page_shows_what_was_recorded() -> None:
    recorded = table.markdown(results.read(ROOT / "benchmarks" / "starts" / "recorded"))[0].splitlines()
    page = (ROOT / "docs" / "selection.md").read_text().splitlines()
    assert len(recorded) > 10
    assert [line for line in recorded if line.startswith("|") and line not in page] == []


def test_a_run_goes_on_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = list(finished(by_rate).values())
    for result in everything[:-2]:
        results.append(tmp_path, result)
    with (tmp_path / results.FILE_NAME).open("a") as file:
        file.write('{"key": "killed in the mid')
    trained: list[Training] = []

    def pretend(training: Training, *_: object) -> Result:
        trained.append(training)
        return made_up(training, by_rate(training))

    monkeypatch.setattr(command, "train", pretend)
    command.run(tmp_path, results.read(tmp_path), tmp_path, MINIATURE)
    assert trained == [result.training for result in everything[-2:]]
    assert list(results.read(tmp_path).values()) == everything


def test_dense_experts_compute_what_the_packed_ones_do(setting: Setting) -> None:
    ids = torch.arange(48).view(2, 24)
    packed, dense = (load(setting.checkpoint, dtype=torch.float32) for _ in range(2))
    hold_dense(dense)
    assert sum(isinstance(module, DenseExperts) for module in dense.modules()) == 4
    assert torch.equal(packed(input_ids=ids).logits, dense(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["lora", "lora_experts"])
def test_lora_has_as_many_parameters_as_the_shared_expert(conversions: Conversions, kind: str) -> None:
    pytest.importorskip("peft")
    model, learning = ready(Training(Subject(kind), 1e-2), conversions)  # type: ignore[arg-type]
    assert sum(parameter.numel() for parameter in learning.values()) == pytest.approx(SHARED_PARAMETERS, rel=0.02)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(learning)


def test_a_miniature_training_learns_its_shared_experts_and_is_measured(
    setting: Setting, conversions: Conversions
) -> None:
    result = train(Training(NEURONS, 1e-2), setting, conversions)
    assert result.parameters == SHARED_PARAMETERS
    assert set(result.after) == set(result.base) == {"arithmetic", KEPT, UNSEEN}
    assert all(result.after[name] != result.base[name] for name in result.base)
    assert result.gain > 0


def test_a_zero_start_that_does_not_move_is_its_base(setting: Setting, conversions: Conversions) -> None:
    result = train(Training(NEURONS, 1e-30), setting, conversions)
    assert result.after == result.base
