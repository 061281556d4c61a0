"""The two packages an author meets, installed as a stranger would: the example in docs/examples and the skeleton."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from author_environment import AuthorEnvironment, build_wheel, run

from nexus_core.contract import CHECKS
from nexus_core.new_plugin import skeleton_files

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "nexus_toy_family"


@dataclass(frozen=True)
class Workplace:
    """An author's machine: an environment with both packages, and a folder to work in."""

    environment: AuthorEnvironment
    folder: Path

    def do(self, *words: str, cwd: Path | None = None) -> str:
        return run([self.environment.python, "-m", *words], cwd=cwd or self.folder, PYTHONPATH="").stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("author")
    # Building writes beside the sources, and the example's are this repository's.
    example = folder / "example"
    shutil.copytree(
        EXAMPLE, example, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info", "tiny", "runs")
    )
    run([sys.executable, "-m", "nexus_core", "plugins", "new", "brand_new", "--out", str(folder / "skeleton")])
    environment = AuthorEnvironment.create(folder / "environment")
    for name in ("example", "skeleton"):
        environment.install(build_wheel(folder / name, folder / "wheels" / name))
        # What is tested is the installed package, not the sources in the current directory.
        (package,) = (path for path in (folder / name).glob("nexus_*") if path.suffix != ".egg-info")
        shutil.rmtree(package)
    return Workplace(environment, folder)


def test_both_are_listed_with_what_they_bring(workplace: Workplace) -> None:
    plugins = json.loads(workplace.do("nexus_core", "plugins", "--json"))["plugins"]
    assert plugins["toy_moe"]["source"] == "nexus-toy-moe 0.1.0"
    assert plugins["toy_moe"]["model_types"] == ["toy_moe"]
    assert plugins["toy_moe"]["hooks_version"] == 1
    assert str(workplace.environment.folder) in plugins["toy_moe"]["folder"]
    assert plugins["toy_strategies"]["brings"] == {
        "selection": ["toy_spread"],
        "merge": ["toy_median"],
        "formats": ["toy_dialogue"],
    }
    assert plugins["brand_new"]["model_types"] == ["brand_new"]


@pytest.mark.slow
def test_the_example_runs_from_collect_to_validate_with_its_own_strategies(workplace: Workplace) -> None:
    place = workplace.folder / "example"
    workplace.do("nexus_toy_moe.tiny", "tiny", cwd=place)
    checked = json.loads(workplace.do("nexus_core", "plugins", "--check", "tiny", "--json", cwd=place))
    assert checked["family"] == "toy_moe"
    assert [hook for hook, answer in checked["hooks"].items() if answer["failed"]] == []

    changes = ["--set", "train.routing.strategy=trainable", "--set", "train.gradient_checkpointing=true"]
    ran = json.loads(workplace.do("nexus_core", "run", "recipe.yaml", "--json", *changes, cwd=place).splitlines()[-1])
    assert ran["status"] == "done"
    assert list(ran["stages"]) == ["collect", "select", "convert", "train", "validate"]
    selection = json.loads((place / ran["stages"]["select"]["path"] / "selection.json").read_text())
    assert selection["strategy"] == "toy_spread"
    assert selection["parameters"] == {"power": 2.0}
    assert json.loads((place / ran["stages"]["convert"]["path"] / "convert_report.json").read_text())["merge"] == (
        "toy_median"
    )
    report = json.loads((place / ran["stages"]["validate"]["path"] / "report.json").read_text())
    learnt = report["sets"]["domain"]
    assert learnt["student"]["perplexity"] < learnt["base"]["perplexity"]


@pytest.mark.slow
def test_the_example_keeps_every_promise_of_the_contract(workplace: Workplace) -> None:
    workplace.do("nexus_toy_moe.tiny", "promising", cwd=workplace.folder)
    said = workplace.do("pytest", "--nexus-contract", "promising", "-q", "-p", "no:cacheprovider")
    assert f"{len(CHECKS)} passed" in said


@pytest.mark.slow
def test_the_skeleton_keeps_every_promise_by_its_own_tests(workplace: Workplace) -> None:
    # The example's run has shown that a plugin of this shape works in a fresh process, which takes longest.
    words = ["-q", "-p", "no:cacheprovider", "-k", "not fresh_process"]
    said = workplace.do("pytest", *words, cwd=workplace.folder / "skeleton")
    assert f"{len(CHECKS) - 1} passed" in said


def test_the_skeleton_has_nothing_left_of_its_placeholder(workplace: Workplace) -> None:
    project = workplace.folder / "skeleton"
    written = [path for path in project.rglob("*") if path.suffix in (".md", ".toml", ".yaml", ".py")]
    assert len(written) >= 4
    texts = {path.name: path.read_text().lower() for path in written}
    assert [name for name, text in texts.items() if "my_moe" in text or "mymoe" in text or "my-moe" in text] == []


@pytest.mark.parametrize("name", ["MyMoe", "my-moe", "9moe", "", "my__moe"])
def test_a_name_that_python_cannot_import_is_refused_with_one_that_it_can(name: str, tmp_path: Path) -> None:
    from nexus_core.errors import UsageError
    from nexus_core.new_plugin import write_plugin

    with pytest.raises(UsageError, match=f"'{name}' cannot name a plugin"):
        write_plugin(name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_family_that_has_a_plugin_gets_no_second_one(tmp_path: Path) -> None:
    from nexus_core.errors import UsageError
    from nexus_core.new_plugin import write_plugin

    with pytest.raises(UsageError, match="the model_type 'gpt_oss' belongs to the plugin 'gpt_oss'"):
        write_plugin("gpt_oss", tmp_path / "new")


def test_a_skeleton_never_overwrites(tmp_path: Path) -> None:
    from nexus_core.errors import UsageError
    from nexus_core.new_plugin import write_plugin

    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(UsageError, match="is there already; name a new folder with --out"):
        write_plugin("mine", tmp_path)


def test_the_skeleton_is_whole() -> None:
    assert {path.name for path in skeleton_files()} >= {"pyproject.toml", "plugin.py", "README.md", "test_contract.py"}
