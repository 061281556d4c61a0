"""What a run was executed with: the commit of the repository that its recipe lies in."""

from __future__ import annotations

import subprocess
from pathlib import Path

import fake_pipeline
import pytest

from nexus_core.pipeline.environment import execution, git_state

IDENTITY = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_that_a_recipe_lies_in_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "--quiet")
    recipe = tmp_path / "recipes" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text("schema: 1\n")
    assert git_state(recipe.parent) == {}  # no commit yet

    git(tmp_path, "add", "recipes")
    git(tmp_path, *IDENTITY, "commit", "--quiet", "-m", "a recipe")
    (tmp_path / "untracked.txt").write_text("of no matter")
    state = {"commit": git(tmp_path, "rev-parse", "HEAD"), "has_changes": False}
    assert git_state(recipe.parent) == state

    recipe.write_text("schema: 1  # changed\n")
    monkeypatch.chdir(recipe.parent)
    assert execution(fake_pipeline.recipe(tmp_path), "cpu")["git"] == state | {"has_changes": True}


def test_without_a_repository_or_git_nothing_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(Path.cwd()) == {}
