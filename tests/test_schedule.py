"""The schedule as a table: what each step goes by."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from nexus_core.recipe.training import Train
from nexus_core.train.schedule import Schedule


def schedule(**changes: object) -> Schedule:
    return Schedule(**({"kind": "deepseek_v3", "steps": 100, "learning_rate": 1.0} | changes))


@pytest.mark.parametrize(
    ("step", "learning_rate", "temperature", "router_learns"),
    [
        (1, 0.02, 4.0, True),
        (25, 0.5, 4.0, True),
        (30, 0.6, 4.0, True),  # the temperature begins to fall after it
        (50, 1.0, 4.0 - 2.0 * 20 / 70, True),  # end of the warm-up, last step of the router
        (51, 1.0, 4.0 - 2.0 * 21 / 70, False),
        (70, 1.0, 4.0 - 2.0 * 40 / 70, False),  # end of the stay
        (85, 0.55, 4.0 - 2.0 * 55 / 70, False),  # half-way down the cosine from 1 to 0.1
        (100, 0.1, 2.0, False),
    ],
)
def test_deepseek_v3(step: int, learning_rate: float, temperature: float, router_learns: bool) -> None:
    settings = schedule().at(step)
    assert math.isclose(settings.learning_rate, learning_rate)
    assert math.isclose(settings.temperature, temperature)
    assert settings.router_weights_learn is settings.router_biases_learn is router_learns
    assert settings.kl_scale == 1.0


def test_cosine_falls_right_after_the_warm_up() -> None:
    rates = [schedule(kind="cosine", warmup_ratio=0.2).at(step).learning_rate for step in (10, 20, 60, 100)]
    assert rates == pytest.approx([0.5, 1.0, 0.55, 0.1])


def test_constant_is_the_full_rate_from_the_first_step_on() -> None:
    assert {schedule(kind="constant").at(step).learning_rate for step in range(1, 101)} == {1.0}


def test_the_rate_never_jumps() -> None:
    rates = [schedule().at(step).learning_rate for step in range(1, 101)]
    assert max(abs(after - before) for before, after in pairwise(rates)) < 0.06


def test_kl_warm_up_raises_the_weights_with_the_rate() -> None:
    scales = [schedule(kl_warmup=True).at(step).kl_scale for step in (1, 25, 50, 100)]
    assert scales == pytest.approx([0.02, 0.5, 1.0, 1.0])


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("kind", ["deepseek_v3", "cosine", "constant"])
def test_runs_of_a_few_steps_have_a_rate_at_every_step(kind: str, steps: int) -> None:
    rates = [schedule(kind=kind, steps=steps).at(step).learning_rate for step in range(1, steps + 1)]
    assert all(0 < rate <= 1 for rate in rates)


@pytest.mark.parametrize(("ratio", "last"), [(0.0, 0), (0.25, 25), (1.0, 100)])
def test_the_router_learns_for_its_share_of_the_steps(ratio: float, last: int) -> None:
    learning = [step for step in range(1, 101) if schedule(bias_freeze_ratio=ratio).at(step).router_biases_learn]
    assert learning == list(range(1, last + 1))


def test_after_freeze_weights_fixes_only_the_biases() -> None:
    settings = schedule(bias_freeze_ratio=0.5, after_freeze="weights")
    assert [settings.at(step).router_weights_learn for step in (50, 51, 100)] == [True, True, True]
    assert [settings.at(step).router_biases_learn for step in (50, 51, 100)] == [True, False, False]


def test_a_temperature_that_never_anneals_stays() -> None:
    assert schedule(anneal_start=1.0).at(100).temperature == 4.0


def test_a_recipes_train_section_becomes_a_schedule() -> None:
    train = Train.model_validate({"max_steps": 10, "learning_rate": 0.5, "schedule": {"kind": "constant"}})
    assert Schedule.of(train).at(3).learning_rate == 0.5
