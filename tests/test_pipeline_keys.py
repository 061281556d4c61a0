"""Keys: each ingredient changes them, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fake_pipeline
import pytest
import torch
from fake_pipeline import plan
from safetensors.torch import save_file

from nexus_core.errors import DataError
from nexus_core.pipeline import keys
from nexus_core.pipeline.keys import Ingredients, data_identity


@pytest.fixture(autouse=True)
def _read_data_afresh() -> None:
    data_identity.cache_clear()


def keys_of(folder: Path, **arguments: Any) -> dict[str, str]:
    data_identity.cache_clear()
    return {step.stage.name: step.key for step in plan(folder, **arguments).steps}


def test_a_key_is_16_hexadecimal_digits_and_stays_the_same(tmp_path: Path) -> None:
    first = keys_of(tmp_path)
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in first.values())
    assert keys_of(tmp_path) == first


def test_a_key_does_not_change_with_the_order_of_settings() -> None:
    one = Ingredients("train", 1, {"a": 1, "b": {"c": 2, "d": 3}}, inputs={"x": "1", "y": "2"})
    other = Ingredients("train", 1, {"b": {"d": 3, "c": 2}, "a": 1}, inputs={"y": "2", "x": "1"})
    assert one.key == other.key


@pytest.mark.parametrize(
    "changed",
    [
        Ingredients("other", 1, {"a": 1}, {}, {"x": "1"}, {"fingerprint": "f"}),
        Ingredients("train", 2, {"a": 1}, {}, {"x": "1"}, {"fingerprint": "f"}),
        Ingredients("train", 1, {"a": 2}, {}, {"x": "1"}, {"fingerprint": "f"}),
        Ingredients("train", 1, {"a": 1}, {}, {"x": "2"}, {"fingerprint": "f"}),
        Ingredients("train", 1, {"a": 1}, {}, {"x": "1"}, {"fingerprint": "g"}),
    ],
)
def test_every_ingredient_changes_the_key(changed: Ingredients) -> None:
    assert changed.key != Ingredients("train", 1, {"a": 1}, {}, {"x": "1"}, {"fingerprint": "f"}).key


def test_a_setting_changes_its_own_stage_and_those_that_read_it(tmp_path: Path) -> None:
    before = keys_of(tmp_path)
    assert changed(before, keys_of(tmp_path, changes={"train__seed": 1})) == {"train"}
    assert changed(before, keys_of(tmp_path, changes={"convert__seed": 1})) == {"convert", "train"}
    assert changed(before, keys_of(tmp_path, changes={"model__dtype": "float32"})) == set(before)


def test_a_new_code_version_changes_the_key(tmp_path: Path) -> None:
    assert changed(keys_of(tmp_path), keys_of(tmp_path, versions=2)) == {"gather", "convert", "train"}


def test_how_a_recipe_is_executed_is_no_part_of_a_key(tmp_path: Path) -> None:
    before = keys_of(tmp_path)
    for change in (
        {"run__device": "auto"},
        {"run__store": str(tmp_path / "elsewhere")},
        {"run__tracking__enabled": "true", "run__tracking__experiment": "x"},
    ):
        assert keys_of(tmp_path, changes=change) == before


def test_data_enters_a_key_by_content_not_by_place(tmp_path: Path) -> None:
    before = keys_of(tmp_path)
    moved = tmp_path / "moved.txt"
    moved.write_text((tmp_path / "domain.txt").read_text())
    assert keys_of(tmp_path, changes={"data__domain__0__path": str(moved)}) == before
    # Same size, same name: only the content tells.
    (tmp_path / "domain.txt").write_text("one\n\ntwa\n")
    assert changed(before, keys_of(tmp_path)) == {"gather", "convert", "train"}


def test_the_model_enters_a_key_by_content(tmp_path: Path) -> None:
    before = keys_of(tmp_path)
    save_file({"weight": torch.arange(4.0) + 1}, tmp_path / "model" / "model.safetensors")
    assert changed(before, keys_of(tmp_path)) == {"gather", "convert", "train"}


def test_a_data_folder_is_known_by_all_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "a.arrow").write_bytes(b"1")
    before = data_identity(str(folder))
    (folder / "b.arrow").write_bytes(b"2")
    data_identity.cache_clear()
    assert data_identity(str(folder)) != before


def test_a_hub_data_set_is_known_by_name_and_revision() -> None:
    assert data_identity("someone/texts", None) == "hub:someone/texts@main"
    assert data_identity("someone/texts", "abc") == "hub:someone/texts@abc"


def test_a_huge_data_file_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "WHOLE_DATA_BYTES", 1000)
    file = tmp_path / "huge.txt"
    file.write_bytes(b"x" * 2_000_000)
    before = data_identity(str(file))
    file.write_bytes(b"x" * 1_999_999 + b"y")
    data_identity.cache_clear()
    assert data_identity(str(file)) != before


@pytest.mark.parametrize("path", ["missing.jsonl", "./a/b", "a/b/c.jsonl", "embedded:nothing"])
def test_missing_data_is_a_data_error(path: str) -> None:
    with pytest.raises(DataError, match="nothing" if "embedded" in path else "no such file or folder"):
        data_identity(path)


def test_what_stage_json_holds_makes_the_same_key_again(tmp_path: Path) -> None:
    outcome = fake_pipeline.run(tmp_path).outcomes[0]
    record = json.loads((outcome.path / "stage.json").read_text())
    again = Ingredients(*(record[name] for name in ("name", "version", "settings", "data", "inputs", "model")))
    assert again.key == outcome.key


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}
