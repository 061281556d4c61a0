"""Merges that cannot be, refused from what a recipe says, and a strategy's answer of another shape."""

from __future__ import annotations

import re

import pytest
from layer_experts import EXPERTS, HIDDEN, WIDTH, random_expert, strategy_of

from nexus_core.errors import ShapeError
from nexus_core.merge import STRATEGIES, check_merged
from nexus_core.types import MergeRequest

NAMES = [strategy.name for strategy in STRATEGIES]


def request(name: str, width: int, **known: object) -> MergeRequest:
    return MergeRequest(merge=name, width=width, expert_width=WIDTH, experts=EXPERTS, **known)


@pytest.mark.parametrize(
    ("name", "parameters", "asked", "key", "message"),
    [
        ("mean", {}, {"width": 33, "chosen": 4}, "width", "is 33, 5 blocks .* only 4 selected experts.* at most 32"),
        ("weighted", {}, {"width": 17, "chosen": 2}, "width", "select at least 3 experts"),
        ("aligned", {}, {"width": 17, "chosen": 2}, "width", "select at least 3 experts"),
        ("top1", {}, {"width": 9, "chosen": 1}, "width", "write at most 8"),
        ("aligned", {"match": "activations"}, {"width": 8, "kept_inputs": 0}, "match", "collect.keep_inputs is 0"),
        ("neurons", {}, {"width": 65}, "width", "8 experts have only 64 neurons"),
        ("neurons", {"pool": "selected"}, {"width": 17, "chosen": 2}, "width", "2 experts have only 16 neurons"),
        ("neurons", {}, {"width": 8, "learnt": ()}, "merge", "collect.data holds none of those sets"),
        ("neurons", {"contrast": 0.5}, {"width": 8, "kept": ()}, "contrast", "is 0.5, .* or write 0"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_read(
    name: str, parameters: dict[str, object], asked: dict[str, object], key: str, message: str
) -> None:
    strategy = strategy_of(name)
    model = strategy.parameters.model_validate(parameters) if strategy.parameters else None

    refusal = strategy.refuses(request(name, **asked), model)

    assert refusal.key == key
    assert re.search(message, refusal.message)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_known_yet_is_not_refused(name: str) -> None:
    strategy = strategy_of(name)
    parameters = strategy.parameters() if strategy.parameters else None

    assert strategy.refuses is None or strategy.refuses(request(name, 4 * WIDTH), parameters) is None


def test_a_strategy_that_gives_another_width_is_named() -> None:
    with pytest.raises(ShapeError, match=r"merge 'mine' gave a gate of \[8, 12\] where \[16, 12\] is wanted"):
        check_merged(random_expert(0), "mine", 16, HIDDEN)
