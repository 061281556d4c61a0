"""The recipes in recipes/ and the page that documents them."""

from pathlib import Path

import pytest

from nexus_core.recipe import load_recipe, recipe_from, resolved
from nexus_core.recipe.documentation import EXAMPLE, document
from nexus_core.recipe.schema import Recipe
from nexus_core.recipe.words import keys_of, section_in

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_the_promised_recipes_are_there():
    assert {path.stem for path in RECIPES} >= {
        "tiny",
        "tiny_trainable_router",
        "tiny_offline",
        "tiny_generated",
        "tiny_zero2",
        "tiny_zero3",
        "gpt_oss_pca_top24",
        "gpt_oss_trainable_router",
        "gpt_oss_20b_pca",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_without_network(path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    recipe = load_recipe(path)
    assert recipe.learnt_sets == ("domain",)
    assert recipe.kept_sets == ("general",)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_data_from_the_hub_is_pinned_to_a_revision(path):
    sources = [source for sources in load_recipe(path).data.values() for source in sources]
    assert all(source.revision and source.config for source in sources if source.path.startswith("nvidia/"))


@pytest.mark.parametrize(
    ("frozen", "trainable"),
    [("tiny", "tiny_trainable_router"), ("gpt_oss_pca_top24", "gpt_oss_trainable_router")],
)
def test_router_recipes_differ_in_nothing_but_training(frozen, trainable):
    one, other = (resolved(load_recipe(ROOT / "recipes" / f"{name}.yaml")) for name in (frozen, trainable))
    assert one["train"]["routing"] == {"strategy": "frozen"}
    assert other["train"]["routing"] == {"strategy": "trainable"}
    other["train"]["routing"] = one["train"]["routing"]
    assert one == other


def test_the_large_recipe_has_the_published_settings():
    recipe = load_recipe(ROOT / "recipes" / "gpt_oss_pca_top24.yaml")
    assert (recipe.select.strategy, recipe.select.top_k) == ("pca", 24)
    assert (recipe.train.learning_rate, recipe.train.max_steps, recipe.train.sequence_length) == (1e-5, 10_000, 1024)
    assert recipe.collect.tokens == 1_000_000
    splits = {source.split for sources in recipe.data.values() for source in sources}
    assert splits == {"code", "math", "tool_calling", "chat"}


def test_documentation_is_up_to_date():
    written = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert written == document(), "run: python -m nexus_core.recipe.documentation --write docs/recipes.md"


def test_every_key_is_documented_with_its_meaning():
    text = document()

    def visit(section):
        for key, field in keys_of(section).items():
            assert field.description, f"{section.__name__}.{key} has no description"
            assert f"| `{key}` |" in text
            if section_in(field.annotation):
                visit(section_in(field.annotation))

    visit(Recipe)


def test_the_documented_example_is_a_valid_recipe(tmp_path):
    path = tmp_path / "example.yaml"
    path.write_text(EXAMPLE)
    recipe = load_recipe(path)
    assert resolved(recipe_from(resolved(recipe))) == resolved(recipe)
