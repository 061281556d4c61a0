"""Plugins: a misspelt hook is refused by name, a checkpoint has one owner, a broken plugin breaks nothing else."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_core import defaults, hookspecs
from nexus_core.errors import CheckpointError, PluginError
from nexus_core.hookspecs import hookimpl
from nexus_core.plugins import Plugins
from nexus_core.stages.strategies import NEEDS, choose_strategy
from nexus_core.types import EmbeddedFile, RouterOutput, Strategy


class Family:
    """Claims one model_type and answers a little."""

    def __init__(self, model_type: str):
        self.model_type = model_type

    @hookimpl
    def nexus_claims(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == self.model_type

    @hookimpl
    def nexus_stored_bytes(self) -> dict[str, int]:
        return {self.model_type: 1}


def plugins_of(**registered: object) -> Plugins:
    plugins = Plugins()
    for name, plugin in registered.items():
        plugins.register(plugin, name, "test")
    return plugins


def test_a_checkpoint_goes_to_the_one_that_claims_it() -> None:
    plugins = plugins_of(a=Family("a"), b=Family("b"))
    assert plugins.family({"model_type": "b"}, "folder").name == "b"
    assert plugins.family({"model_type": "b"}, "folder").hook.nexus_stored_bytes(config={}) == {"b": 1}
    assert plugins.family({"model_type": "a"}, "folder").hook.nexus_stored_bytes(config={}) == {"a": 1}


def test_a_checkpoint_that_nobody_claims_is_refused() -> None:
    with pytest.raises(CheckpointError, match="models/x: no plugin claims model_type 'c'; `nexus plugins` lists"):
        plugins_of(a=Family("a")).family({"model_type": "c"}, "models/x")


def test_a_checkpoint_that_two_claim_is_refused_with_both_names() -> None:
    with pytest.raises(CheckpointError, match=r"claimed by 2 plugins \((a, b|b, a)\); uninstall all but one"):
        plugins_of(a=Family("x"), b=Family("x")).family({"model_type": "x"}, "models/x")


def test_a_misspelt_hook_is_refused_by_name() -> None:
    class Misspelt:
        @hookimpl
        def nexus_stored_byte(self) -> None: ...

    with pytest.raises(
        PluginError, match="'nexus_stored_byte' is not a hook of NEXUS; did you mean 'nexus_stored_bytes'"
    ):
        plugins_of(misspelt=Misspelt())


def test_a_wrong_argument_is_refused_and_the_whole_plugin_with_it() -> None:
    class Wrong:
        @hookimpl
        def nexus_claims(self, config: Mapping[str, Any]) -> bool:
            return True

        @hookimpl
        def nexus_describe_moe(self, configuration: Mapping[str, Any]) -> None: ...

    plugins = Plugins()
    with pytest.raises(PluginError, match="configuration"):
        plugins.register(Wrong(), "wrong", "test")
    assert "wrong" not in plugins.names()
    with pytest.raises(CheckpointError, match="no plugin claims"):
        plugins.family({"model_type": "x"}, "folder")


def test_a_plugin_that_cannot_be_imported_is_reported_and_the_others_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugin_that_breaks.py").write_text("import a_library_that_is_not_there")
    (tmp_path / "plugin_that_works.py").write_text(
        "from nexus_core import hookimpl\n\n@hookimpl\ndef nexus_claims(config):\n    return config == {}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    group = "nexus.plugins"
    plugins = Plugins(
        [EntryPoint("breaks", "plugin_that_breaks", group), EntryPoint("works", "plugin_that_works", group)]
    )
    (broken,) = plugins.broken
    assert broken.name == "breaks"
    assert "No module named 'a_library_that_is_not_there'" in broken.reason
    assert plugins.family({}, "folder").name == "works"


def test_a_family_falls_back_on_cores_defaults() -> None:
    hook = plugins_of(a=Family("a")).family({"model_type": "a"}, "folder").hook
    logits, weights, indices = torch.zeros(2, 4), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64)
    output = hook.nexus_router_logits(output=(logits, weights, indices))
    assert isinstance(output, RouterOutput)
    assert output.logits is logits
    dense = hook.nexus_dequantize(
        config={}, tensors={"weight": torch.ones(2, dtype=torch.bfloat16)}, dtype=torch.float32
    )
    assert dense.dtype == torch.float32


def test_a_family_that_does_not_answer_is_told_which_hook() -> None:
    hook = plugins_of(a=Family("a"), b=Family("b")).family({"model_type": "a"}, "folder").hook
    with pytest.raises(PluginError, match="plugin 'a' claims this model but does not answer nexus_describe_moe"):
        hook.nexus_describe_moe(config={})


def test_strategies_of_all_plugins_come_together_and_a_double_name_is_refused() -> None:
    def choose() -> None: ...

    class Brings:
        @hookimpl
        def nexus_selection_strategies(self) -> list[Strategy]:
            return [Strategy("mine", choose, "for the test")]

    found = plugins_of(one=Brings()).strategies("selection")
    assert found["mine"].summary == "for the test"
    assert "pca" in found
    disputed = plugins_of(one=Brings(), two=Brings()).strategies("selection")
    assert disputed["pca"].name == "pca"
    with pytest.raises(PluginError, match="two plugins register the selection strategy 'mine', one and two; uninstall"):
        disputed["mine"]


@pytest.mark.parametrize(
    ("kind", "hook", "need", "known"),
    [
        ("losses", "nexus_losses", "teacher_hiden", "did you mean 'teacher_hidden'?"),
        ("selection", "nexus_selection_strategies", "topkcount", "did you mean 'topk_count'?"),
        ("data_formats", "nexus_data_formats", "x", ""),
    ],
)
def test_a_strategy_that_needs_what_nobody_gathers_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: str, hook: str, need: str, known: str
) -> None:
    brings = type("Brings", (), {hook: hookimpl(lambda self: [Strategy("mine", print, "", needs=frozenset({need}))])})
    monkeypatch.setattr("nexus_core.stages.strategies.installed", lambda: plugins_of(brings=brings()))
    with pytest.raises(
        PluginError,
        match=rf"{kind} strategy 'mine' says that it needs '{need}', which NEXUS does not know.*{re.escape(known)}",
    ):
        choose_strategy(kind, "mine", {})


@pytest.mark.parametrize("kind", NEEDS)
def test_what_every_strategy_of_nexus_needs_is_known(kind: str) -> None:
    for name, strategy in Plugins().strategies(kind).items():
        assert strategy.needs <= NEEDS[kind], name


def test_embedded_files_are_found_by_name() -> None:
    class Brings:
        @hookimpl
        def nexus_embedded_files(self) -> list[EmbeddedFile]:
            return [EmbeddedFile("poems", Path("poems.txt"), "data", "for the test")]

    assert plugins_of(brings=Brings()).embedded()["poems"].path == Path("poems.txt")


def test_a_plugin_can_be_taken_out_again() -> None:
    plugins = plugins_of(a=Family("a"))
    plugins.unregister("a")
    plugins.unregister("a")
    assert "a" not in plugins.names()
    assert "a" not in plugins.sources
    plugins.register(Family("a"), "a", "test")


def test_two_plugins_of_one_name_are_refused() -> None:
    with pytest.raises(PluginError, match=r"plugin 'a' \(other 1.0\) is registered already"):
        plugins_of(a=Family("a")).register(Family("b"), "a", "other 1.0")


def test_cores_defaults_come_last_and_take_documented_arguments() -> None:
    specifications = {name: item for name, item in vars(hookspecs).items() if name.startswith("nexus_")}
    for name, function in vars(defaults).items():
        if name.startswith("nexus_"):
            assert getattr(function, "nexus_impl")["trylast"], name  # noqa: B009 - set by pluggy
            assert set(inspect.signature(function).parameters) <= set(
                inspect.signature(specifications[name]).parameters
            )


@pytest.mark.parametrize("name", [name for name in vars(hookspecs) if name.startswith("nexus_")])
def test_every_hook_is_documented(name: str) -> None:
    function = getattr(hookspecs, name)
    documentation = inspect.getdoc(function)
    assert documentation
    assert documentation.splitlines()[0].endswith((".", ";", ",", ":")) or len(documentation.splitlines()) > 1
    assert all(
        parameter.annotation is not parameter.empty for parameter in inspect.signature(function).parameters.values()
    )
