"""What the install commands install: pinned, but for what torch's builds choose themselves."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
# Every build of torch for GPUs requires one version of each, another one from release to release.
CHOSEN_BY_TORCH = re.compile(r"triton|pytorch-triton|nvidia-.*|cuda-.*")


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def test_every_direct_dependency_is_pinned_to_a_version_it_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    requirements = [Requirement(line) for line in listed]
    versions = pinned()
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        if name != canonicalize_name(project["name"]) and not CHOSEN_BY_TORCH.fullmatch(name):
            assert name in versions, f"{name} is in pyproject.toml and not in constraints.txt"
            assert requirement.specifier.contains(versions[name]), f"{requirement} does not allow {versions[name]}"


def test_nothing_is_pinned_that_torch_builds_for_gpus_pin_themselves() -> None:
    assert [name for name in pinned() if CHOSEN_BY_TORCH.fullmatch(name)] == []
