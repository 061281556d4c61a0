"""`pytest --nexus-contract CHECKPOINT` in an author's own repository, and pytest runs that want nothing of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from author_environment import install_module, run
from gpt_oss_checkpoints import write_tiny_checkpoint

from nexus_core.contract import CHECKS

# The whole contract runs for every family elsewhere; these take no time.
QUICK = "claims or locations or stored_bytes"


def run_pytest(*words: str, cwd: Path, expect: int = 0, **environment: str) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    done = run(command, cwd=cwd, expect=expect, **environment)
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("contract") / "model")


def test_every_promise_is_a_test_and_only_those_that_are_asked_for_run(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text("def test_mine():\n    assert False\n")
    said = run_pytest("--nexus-contract", str(checkpoint), "--collect-only", "-q", cwd=tmp_path)
    assert [line for line in said.splitlines() if "::" in line] == [
        f"nexus-contract[{checkpoint}]::{name}" for name in CHECKS
    ]
    said = run_pytest("--nexus-contract", str(checkpoint), "-v", "-k", QUICK, cwd=tmp_path)
    assert "::claims PASSED" in said
    assert "3 passed" in said


def test_tests_that_are_named_run_beside_the_contract(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text("def test_locations_of_mine():\n    pass\n")
    said = run_pytest("--nexus-contract", str(checkpoint), "test_mine.py", "-k", "locations", cwd=tmp_path)
    assert "2 passed" in said


def test_a_broken_promise_is_two_lines_and_no_traceback(tmp_path: Path) -> None:
    target = tmp_path / "target"
    install_module(target, "forgetful", FORGETFUL)
    model = write_tiny_checkpoint(tmp_path / "model")
    config = model / "config.json"
    config.write_text(config.read_text().replace('"gpt_oss"', '"forgetful"'))
    said = run_pytest(
        "--nexus-contract", "model", "-k", "locations or stored_bytes", cwd=tmp_path, expect=1, PYTHONPATH=str(target)
    )
    assert "promised: The description and the experts' locations agree with the headers on disk" in said
    assert "   found: nexus_enumerate_experts: must go by layer, then expert, all of them once" in said
    assert "plugin 'forgetful' (forgetful 1.0) failed in nexus_read_expert: ZeroDivisionError" in said
    assert f"at: {target / 'forgetful.py'}:" in said
    assert "Traceback" not in said


def test_a_folder_that_is_no_checkpoint_is_a_sentence(tmp_path: Path) -> None:
    said = run_pytest("--nexus-contract", "nowhere", "-k", "claims", cwd=tmp_path, expect=1)
    assert "nowhere: there is no such folder" in said
    assert "Traceback" not in said


def test_other_runs_of_pytest_import_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "test_light.py").write_text(
        "import sys\n\n\ndef test_light():\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'nexus_core.contract', 'nexus_core.plugins'}\n"
        "    assert heavy & set(sys.modules) == set()\n"
    )
    assert "1 passed" in run_pytest(cwd=tmp_path)


FORGETFUL = """
from nexus_core import hookimpl
from nexus_core.types import MoeDescription


@hookimpl
def nexus_claims(config):
    return config["model_type"] == "forgetful"


@hookimpl
def nexus_describe_moe(config):
    return MoeDescription("forgetful", "forgetful", (0, 1), 8, 2, 64, 32, 128, "mxfp4", True, True)


@hookimpl
def nexus_enumerate_experts(config):
    return []


@hookimpl
def nexus_read_expert(config):
    return 1 / 0


@hookimpl
def nexus_shared_expert_tensors(layer, weights):
    return {f"shared.{layer}": weights.gate}


@hookimpl
def nexus_converted_config(config, width):
    return dict(config)
"""
