"""A family that NEXUS does not bring costs one row: the whole of it stands here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from family_checkpoints import CONFIGS, EXPERTS, write_family_checkpoint

from nexus_core.contract import CHECKS, Subject
from nexus_core.families import Layout, TransformersFamilies, top_k_of_softmax
from nexus_core.plugins import installed


def is_normalised(config: dict[str, object]) -> bool:
    return bool(config.get("norm_topk_prob"))


flex_olmo = Layout(
    model_type="flex_olmo",
    gate_weights=top_k_of_softmax(weights_sum_to_one=is_normalised),
    weights_sum_to_one=is_normalised,
    expert_width="intermediate_size",
)


@pytest.fixture(scope="module", autouse=True)
def plugin() -> Iterator[None]:
    installed().register(TransformersFamilies(flex_olmo), "outside", "this test")
    CONFIGS["flex_olmo"] = {"num_experts": EXPERTS, "intermediate_size": 16, "norm_topk_prob": True}
    yield
    del CONFIGS["flex_olmo"]
    installed().unregister("outside")


@pytest.fixture(scope="module")
def base(plugin: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family_checkpoint(tmp_path_factory.mktemp("flex_olmo") / "base", "flex_olmo")


@pytest.mark.parametrize("check", sorted(CHECKS.keys() - {"fresh_process"}))
def test_a_family_from_outside_keeps_the_contract(base: Path, tmp_path: Path, check: str) -> None:
    CHECKS[check](Subject(base, tmp_path))
