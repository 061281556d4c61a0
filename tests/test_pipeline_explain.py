"""Explanations: each reason for a stage to run again is named, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fake_pipeline import plan, run
from safetensors.torch import save_file

from nexus_core.pipeline.explain import Explanation, explain, flat
from nexus_core.pipeline.keys import data_identity


def explained(folder: Path, **arguments: Any) -> dict[str, Explanation]:
    data_identity.cache_clear()
    return {item.stage: item for item in explain(plan(folder, **arguments))}


def test_without_earlier_outputs_everything_runs(tmp_path: Path) -> None:
    found = explained(tmp_path)
    assert found["train"].reasons == (f"there is no earlier output of train in {tmp_path / 'runs'}",)
    assert found["train"].compared_with is None
    assert not (tmp_path / "runs").exists()


def test_unchanged_stages_are_reused_without_reasons(tmp_path: Path) -> None:
    run(tmp_path)
    assert all(item.reused and not item.reasons for item in explained(tmp_path).values())


def test_a_changed_setting_and_what_follows_from_it_are_named(tmp_path: Path) -> None:
    before = run(tmp_path)
    found = explained(tmp_path, changes={"convert__seed": 5})
    assert found["gather"].reused
    assert found["convert"].reasons == ("seed: 0 -> 5",)
    assert found["convert"].compared_with == before.outcomes[1].path
    (reason,) = found["train"].reasons
    assert reason == f"its input convert is another: {before.outcomes[1].key} -> {found['convert'].key}"


def test_the_nearest_earlier_output_is_compared(tmp_path: Path) -> None:
    run(tmp_path, changes={"train__max_steps": 7, "train__seed": 1})
    run(tmp_path, changes={"train__max_steps": 9, "train__seed": 2})
    assert explained(tmp_path, changes={"train__max_steps": 7, "train__seed": 3})["train"].reasons == ("seed: 1 -> 3",)


def test_code_model_type_and_data_are_named(tmp_path: Path) -> None:
    run(tmp_path)
    assert "the code of gather changed: version 1 -> 2" in explained(tmp_path, versions=2)["gather"].reasons
    assert "model.dtype: auto -> float32" in explained(tmp_path, changes={"model__dtype": "float32"})["gather"].reasons

    domain = tmp_path / "domain.txt"
    domain.write_text("another text\n")
    (reason,) = explained(tmp_path)["gather"].reasons
    assert reason == f"data.domain[0].path: the content of {domain} changed"

    other = tmp_path / "other.txt"
    other.write_text("and another\n")
    (reason,) = explained(tmp_path, changes={"data__domain__0__path": str(other)})["gather"].reasons
    assert reason == f"data.domain[0].path: {domain} -> {other}"

    domain.write_text("one\n\ntwo\n")
    save_file({"weight": torch.zeros(4)}, tmp_path / "model" / "model.safetensors")
    (reason,) = explained(tmp_path)["gather"].reasons
    assert reason.startswith("the model's content changed: fingerprint ")


def test_flat_settings_keep_empty_parts() -> None:
    assert flat({"a": {"b": [1, {"c": 2}], "d": {}}, "e": []}) == {"a.b[0]": 1, "a.b[1].c": 2, "a.d": {}, "e": []}
