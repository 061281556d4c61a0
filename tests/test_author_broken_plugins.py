"""A broken plugin is named, with the reason, and takes nothing down for those who do not use it.

Every plugin here is really installed, in a folder of its own with the metadata that an installer leaves.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from author_environment import install_module, run

HEADER = "from nexus_core import hookimpl\nfrom nexus_core.types import Strategy\n"


def hook(name: str, body: str, arguments: str = "") -> str:
    return f"{HEADER}\n@hookimpl\ndef {name}({arguments}):\n    {body}\n"


# What each would do to the program if it could, and what must be said of it.
LEFT_OUT = {
    "cannot_import": ("import a_library_that_is_not_there\n", "No module named 'a_library_that_is_not_there'"),
    "exits": ("raise SystemExit('enough')\n", "SystemExit: enough"),
    "bad_syntax": ("def (:\n", "SyntaxError"),
    "wrong_argument": (
        hook("nexus_claims", "return True", "configuration"),
        "'nexus_claims' takes an argument 'configuration', which the hook does not have; did you mean 'config'?",
    ),
    "misspelt": (
        hook("nexus_claim", "return True", "config"),
        "'nexus_claim' is not a hook of NEXUS; did you mean 'nexus_claims'?",
    ),
    "undecorated": (
        "def nexus_claims(config):\n    return True\n",
        "'nexus_claims' would never be called: write @nexus_core.hookimpl above it",
    ),
    "empty": ("", "it has no hook"),
    "from_the_future": (
        "NEXUS_HOOKS = 99\n" + hook("nexus_foresee", "return None"),
        "'nexus_foresee' is not a hook of NEXUS; docs/hooks.md lists the hooks; it was written for version 99",
    ),
    "odd_version": (
        "NEXUS_HOOKS = 'one'\n" + hook("nexus_claims", "return False", "config"),
        "its NEXUS_HOOKS is 'one'; write the number 1",
    ),
}
FAILING = {
    "claims_nothing_well": (
        hook("nexus_claims", "return config['no_such_key']", "config"),
        "plugin 'claims_nothing_well' (claims_nothing_well 1.0) failed in nexus_claims: KeyError: 'no_such_key'",
    ),
    "strategies_raise": (
        hook("nexus_selection_strategies", "raise RuntimeError('not today')"),
        "failed in nexus_selection_strategies: RuntimeError: not today",
    ),
    "strategies_are_text": (
        hook("nexus_merge_strategies", "return ['median']"),
        "answers nexus_merge_strategies with ['median'], not with a list of Strategy",
    ),
    "takes_pca": (
        hook("nexus_selection_strategies", "return [Strategy('pca', print, 'not the real one')]"),
        "registers the selection strategy 'pca', which NEXUS itself has; NEXUS's own is used",
    ),
    "old": (
        "NEXUS_HOOKS = 0\n" + hook("nexus_claims", "return False", "config"),
        "plugin 'old' (old 1.0) is used as it is; it was written for version 0 of the hooks and this NEXUS has 1",
    ),
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all of them are installed."""
    target = tmp_path_factory.mktemp("broken")
    for name, (code, _) in {**LEFT_OUT, **FAILING}.items():
        install_module(target, name, code)
    install_module(target, "a_class", "class Plugin: ...\n", entry="a_class:Plugin")
    return target


def nexus(*words: str, path: Path, cwd: Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "nexus_core", *words], cwd=cwd, expect=expect, PYTHONPATH=str(path))


@pytest.fixture(scope="module")
def listed(broken: Path) -> subprocess.CompletedProcess[str]:
    return nexus("plugins", "--json", path=broken, cwd=broken)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_plugin_that_does_not_fit_is_left_out_with_the_reason(
    name: str, listed: subprocess.CompletedProcess[str]
) -> None:
    answer = json.loads(listed.stdout.splitlines()[-1])
    (found,) = [plugin for plugin in answer["broken"] if plugin["name"] == name]
    assert found["source"] == f"{name} 1.0"
    assert LEFT_OUT[name][1] in found["reason"]
    assert f"plugin '{name}' ({name} 1.0) is left out: " in listed.stderr
    assert name not in answer["plugins"]


def test_a_class_is_not_a_plugin(listed: subprocess.CompletedProcess[str]) -> None:
    assert "it is the class Plugin, not an object; let the entry point name a module or an instance" in listed.stderr


def test_the_others_are_listed_and_those_that_fail_say_how(listed: subprocess.CompletedProcess[str]) -> None:
    plugins = json.loads(listed.stdout.splitlines()[-1])["plugins"]
    assert "gpt_oss" in plugins["gpt_oss"]["model_types"]
    assert plugins["gpt_oss"]["problems"] == []
    for name in ("claims_nothing_well", "strategies_raise", "strategies_are_text"):
        assert len(plugins[name]["problems"]) == 1, name


def test_the_program_goes_on_for_everybody_else(broken: Path, tmp_path: Path) -> None:
    recipe = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
    checked = nexus("check", str(recipe), path=broken, cwd=tmp_path)
    for name, (_, said) in FAILING.items():
        assert checked.stderr.count(said) == 1, name
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    refused = nexus("plugins", "--check", str(tmp_path), path=broken, cwd=tmp_path, expect=2)
    assert "no plugin claims model_type 'unheard_of'" in refused.stderr
    assert "broken and not asked: " in refused.stderr


def test_a_checkpoint_that_two_claim_is_refused_with_both_names(tmp_path: Path) -> None:
    target = tmp_path / "target"
    install_module(target, "greedy", hook("nexus_claims", "return config['model_type'] == 'gpt_oss'", "config"))
    refused = nexus("plugins", "--check", "embedded:tiny-gpt-oss", path=target, cwd=tmp_path, expect=2)
    assert "is claimed by 2 plugins (gpt_oss, greedy)" in refused.stderr.replace("greedy, gpt_oss", "gpt_oss, greedy")
    assert "greedy" in nexus("plugins", path=target, cwd=tmp_path).stdout


def test_a_hook_of_the_owner_that_raises_is_named_and_the_other_hooks_still_answer(tmp_path: Path) -> None:
    target, model = tmp_path / "target", tmp_path / "model"
    code = hook("nexus_claims", "return config['model_type'] == 'mine'", "config")
    code += "\n@hookimpl\ndef nexus_describe_moe(config):\n    return config['layers']\n"
    code += "\n@hookimpl\ndef nexus_converted_config(config, width):\n    return dict(config)\n"
    install_module(target, "mine", code)
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "mine"}')
    weights = b'{"weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (model / "model.safetensors").write_bytes(len(weights).to_bytes(8, "little") + weights + bytes(4))

    told = nexus("plugins", "--check", str(model), "--json", path=target, cwd=tmp_path, expect=1)
    hooks = json.loads(told.stdout.splitlines()[-1])["hooks"]
    assert hooks["nexus_claims"]["failed"] is False
    assert (
        "plugin 'mine' (mine 1.0) failed in nexus_describe_moe: KeyError: 'layers'"
        in (hooks["nexus_describe_moe"]["answer"])
    )
    assert hooks["nexus_moe_blocks"] == {"by": "", "answer": "missing", "failed": True}

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("schema: 1\nmodel: {path: model}\ndata: {domain: [{path: embedded:arithmetic}]}\n")
    refused = nexus("check", str(recipe), path=target, cwd=tmp_path, expect=2)
    assert "failed in nexus_describe_moe: KeyError: 'layers'; tell its author" in refused.stderr
    assert "Traceback" not in refused.stderr
