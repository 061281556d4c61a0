"""`nexus check` of a model whose weights are not here: it downloads none, and says what is known without them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from command_line import call
from gpt_oss_checkpoints import write_tiny_checkpoint

from nexus_core.checkpoint.source import open_checkpoint
from nexus_core.errors import CheckpointError, PluginError
from nexus_core.pipeline import preflight

HUB_ID = "someone/tiny-moe"
INDEX = "model.safetensors.index.json"

RECIPE = """
schema: 1
model: {{path: {model}}}
data:
  domain: [{{path: embedded:arithmetic}}]
  general: [{{path: embedded:prose}}]
select: {{top_k: 4}}
train: {{max_steps: 3, sequence_length: 16}}
run: {{device: cpu, store: {store}, tracking: {{enabled: false}}}}
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with all of its files."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("whole"), vocabulary=512, tokenizer=True)


class Hub:
    """Stands for the Hub and its cache: gives those files of a checkpoint that match the patterns asked for."""

    def __init__(self, published: Path, cache: Path):
        self.published, self.cache = published, cache
        self.asked: list[list[str]] = []

    def snapshot_download(self, hub_id: str, *, allow_patterns: Sequence[str], **others: Any) -> str:
        assert hub_id == HUB_ID
        self.asked.append(list(allow_patterns))
        self.cache.mkdir(exist_ok=True)
        for file in self.published.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, self.cache)
        return str(self.cache)


@pytest.fixture
def hub(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(whole, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", found.snapshot_download)
    return found


def described(whole: Path, folder: Path, *, indexed: bool) -> Path:
    """A copy of a checkpoint without its weights."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors", *([] if indexed else [INDEX])))
    return folder


def written(folder: Path, model: str, *more: str) -> str:
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(model=model, store=folder / "runs") + "\n".join(more))
    return str(file)


def answered(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert call(*arguments, "--json") == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(answer, dict)
    return answer


def stored_bytes(folder: Path) -> int:
    total = json.loads((folder / INDEX).read_text())["metadata"]["total_size"]
    assert isinstance(total, int)
    return total


def test_check_of_a_hub_id_downloads_no_weights(
    whole: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path, HUB_ID)
    answer = answered(capsys, "check", recipe)
    (patterns,) = hub.asked
    fetched = {file.name for file in whole.iterdir() if any(fnmatch(file.name, pattern) for pattern in patterns)}
    assert fetched == {file.name for file in whole.iterdir() if file.suffix != ".safetensors"}
    assert {"config.json", "tokenizer.json", INDEX} <= fetched
    total = stored_bytes(whole)
    (missing,) = answer["model"]["missing_weights"]
    assert missing == {"path": str(hub.cache), "stored_bytes": total, "download_bytes": total, "downloaded": True}
    assert answer["disk"]["download_bytes"] == total
    written_by_stages = sum(stage["disk_bytes"] for stage in answer["stages"].values())
    assert answer["disk"]["needs_bytes"] == total + written_by_stages
    assert answer["model"]["fingerprint"] is None
    assert {(stage["key"], stage["path"], stage["reused"]) for stage in answer["stages"].values()} == {
        (None, None, False)
    }
    assert answer["stages"]["train"]["tokens"] == 3 * 1 * 4 * 16
    assert call("check", recipe) == 0
    said = capsys.readouterr().out
    assert f"weights  of {HUB_ID} are not here" in said
    assert "`nexus run` downloads to" in said
    assert "train     runs    no reuse key without the weights" in said
    assert not (tmp_path / "runs").exists()


def test_check_of_a_hub_id_uses_the_weights_that_are_cached(
    whole: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, hub.cache)
    answer = answered(capsys, "check", written(tmp_path, HUB_ID))
    assert answer["model"]["missing_weights"] == []
    assert answer["disk"]["download_bytes"] == 0
    assert all(stage["key"] for stage in answer["stages"].values())
    next(hub.cache.glob("*.safetensors")).unlink()
    (missing,) = answered(capsys, "check", written(tmp_path, HUB_ID))["model"]["missing_weights"]
    assert 0 < missing["download_bytes"] < missing["stored_bytes"]


def test_a_download_that_its_disk_cannot_hold_is_a_warning(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = written(tmp_path, HUB_ID)
    needs = answered(capsys, "check", recipe)["disk"]["needs_bytes"]
    monkeypatch.setattr(preflight, "free_disk_bytes", lambda folder: needs - 1)
    assert call("check", recipe) == 0
    assert "warning: the stages and the download of weights write about" in capsys.readouterr().out
    monkeypatch.setattr(preflight, "on_one_disk", lambda first, second: False)
    assert call("check", recipe) == 0
    assert "warning" not in capsys.readouterr().out
    monkeypatch.setattr(preflight, "free_disk_bytes", lambda folder: 1000 if folder == hub.cache else 10**12)
    assert call("check", recipe) == 0
    assert f"warning: the weights of {HUB_ID} take" in capsys.readouterr().out


@pytest.mark.parametrize("indexed", [False, True])
def test_check_of_a_folder_without_weights_needs_its_config_only(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], indexed: bool
) -> None:
    recipe = written(tmp_path, str(described(whole, tmp_path / "model", indexed=indexed)))
    answer = answered(capsys, "check", recipe)
    (missing,) = answer["model"]["missing_weights"]
    assert (missing["stored_bytes"], missing["download_bytes"]) == (stored_bytes(whole), 0)
    assert not missing["downloaded"]
    here = answered(capsys, "check", written(tmp_path, str(whole)))
    for name, stage in here["stages"].items():
        assert answer["stages"][name]["memory_bytes"] == stage["memory_bytes"]
        assert stage["key"]
    assert here["model"]["missing_weights"] == []


@pytest.mark.parametrize("indexed", [False, True])
def test_run_refuses_a_folder_without_weights(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], indexed: bool
) -> None:
    recipe = written(tmp_path, str(described(whole, tmp_path / "model", indexed=indexed)))
    assert call("run", recipe) == 2
    said = capsys.readouterr().err
    missing = (
        "named by model.safetensors.index.json but missing" if indexed else f"neither model.safetensors nor {INDEX}"
    )
    assert missing in said
    assert not (tmp_path / "runs").exists()


def test_a_folder_with_some_of_its_shards_is_damaged(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "model")
    next((tmp_path / "model").glob("*.safetensors")).unlink()
    assert call("check", written(tmp_path, str(tmp_path / "model"))) == 2
    assert "missing; copy or download it" in capsys.readouterr().err


def test_another_teacher_without_weights_leaves_the_keys_of_what_comes_before_it(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = described(whole, tmp_path / "teacher", indexed=True)
    recipe = written(tmp_path, str(whole))
    changes = ("train.teacher.kind=offline", f"train.teacher.path={teacher}", "train.losses.router_kl=0")
    answer = answered(capsys, "check", recipe, *(word for change in changes for word in ("--set", change)))
    keyed = {name for name, stage in answer["stages"].items() if stage["key"]}
    assert keyed == {"collect", "select", "convert"}
    assert answer["model"]["fingerprint"]
    assert [missing["path"] for missing in answer["model"]["missing_weights"]] == [str(teacher)]


def test_a_family_that_tells_no_sizes_is_asked_for_an_index(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(described(whole, tmp_path / "model", indexed=False))

    class Silent:
        def nexus_stored_bytes(self, config: Any) -> None:
            raise PluginError("does not say")

    monkeypatch.setattr(checkpoint.family, "hook", Silent())
    with pytest.raises(CheckpointError, match="neither weights nor model"):
        preflight.stored_bytes(checkpoint)
    shutil.copy(whole / INDEX, checkpoint.folder)
    assert preflight.stored_bytes(checkpoint) == {"tensors": stored_bytes(whole)}
