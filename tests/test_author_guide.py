"""docs/add_a_family.md says what the example and the code say."""

from __future__ import annotations

import re
import types
from pathlib import Path

from nexus_core import hookspecs
from nexus_core.families import Layout, PerExpert, every_layer
from nexus_core.plugins import Plugins
from nexus_core.registration import HOOK_NAMES

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "add_a_family.md"
EXAMPLE = ROOT / "docs" / "examples" / "nexus_toy_family"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)


def test_code_that_names_a_file_of_the_example_stands_in_it_word_for_word() -> None:
    named = [re.fullmatch(r"# (\S+/\S+\.py)\n(.*)", block, re.DOTALL) for block in blocks("python")]
    shown = [(ROOT if match[1].startswith("plugins/") else EXAMPLE, match[1], match[2]) for match in named if match]
    assert len(shown) >= 10
    assert [(name, code) for folder, name, code in shown if code not in (folder / name).read_text()] == []


def test_every_field_of_a_layout_is_in_the_table_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", GUIDE.read_text(), re.MULTILINE))
    defaults = vars(Layout(model_type="my_moe", gate_weights=every_layer, weights_sum_to_one=every_layer))
    assert [name for name in defaults if name not in rows] == []
    told = {name: row.strip("`") for name, row in rows.items() if name in defaults and row != "none"}
    expected = {name: value.__name__ if callable(value) else repr(value) for name, value in defaults.items()}
    assert {name: row.replace("PerExpert()", repr(PerExpert())) for name, row in told.items()} == {
        name: expected[name].replace("'", '"') if name != "stored_experts" else expected[name] for name in told
    }


def test_settings_that_are_shown_are_the_examples() -> None:
    recipe, project = (EXAMPLE / "recipe.yaml").read_text(), (EXAMPLE / "pyproject.toml").read_text()
    assert [block for block in blocks("yaml") if block not in recipe] == []
    named = [block for block in blocks("toml") if "toy_" in block]
    assert len(named) == 2
    assert [block for block in named if block not in project] == []


def test_the_short_road_is_a_plugin_as_printed() -> None:
    code = next(block for block in blocks("python") if "nexus_my_moe.py" in block)
    module = types.ModuleType("nexus_my_moe")
    exec(code, vars(module))
    plugins = Plugins()
    plugins.register(module.families, "my_moe", "the guide")
    config = {
        "model_type": "my_moe",
        "num_hidden_layers": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "hidden_size": 8,
        "moe_intermediate_size": 16,
        "vocab_size": 32,
    }
    described = plugins.family(config, "the guide").hook.nexus_describe_moe(config=config)
    assert (described.layers, described.experts, described.expert_width) == ((0, 1), 4, 16)


def test_every_hook_of_families_is_in_the_table() -> None:
    rows = re.findall(r"^\| `(nexus_\w+)` \|", GUIDE.read_text(), re.MULTILINE)
    assert rows == HOOK_NAMES[: HOOK_NAMES.index("nexus_selection_strategies")]


def test_the_version_that_is_promised_is_the_codes() -> None:
    page = (ROOT / "docs" / "hooks.md").read_text()
    assert f"now **{hookspecs.HOOKS_VERSION}**" in page
    assert f"\n| {hookspecs.HOOKS_VERSION} | " in page
    assert f"NEXUS_HOOKS = {hookspecs.HOOKS_VERSION}" in page
    assert f"NEXUS_HOOKS = {hookspecs.HOOKS_VERSION}" in GUIDE.read_text()
