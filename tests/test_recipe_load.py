"""Recipes that are right: what they mean once loaded, overridden, built in Python or from flags."""

import pytest
from pydantic import BaseModel, ConfigDict, Field

from nexus_core.errors import RecipeError
from nexus_core.hookspecs import hookimpl
from nexus_core.plugins import Plugins
from nexus_core.recipe import check_against_model, load_recipe, recipe_from, resolved, section_from
from nexus_core.recipe.schema import Collect, Convert, Select
from nexus_core.recipe.training import Train
from nexus_core.types import MoeDescription, Strategy

VALID = """\
schema: 1
model: {path: models/base}
data:
  domain:
    - path: domain.jsonl
  general:
    - path: general.txt
select: {strategy: pca, top_k: 24}
"""

DESCRIPTION = MoeDescription(
    family="any",
    model_type="any_moe",
    layers=(0, 1),
    experts=16,
    experts_per_token=2,
    hidden_size=64,
    expert_width=32,
    vocabulary_size=100,
    storage="bfloat16",
    weights_sum_to_one=True,
    has_expert_biases=False,
)


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(VALID)
    return path


def test_a_recipe_knows_where_it_came_from(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe.name == "mine"
    assert recipe.folder == recipe_file.parent
    assert recipe.text == VALID
    assert recipe.location("select.top_k") == f"{recipe_file}:8:32"
    assert recipe.location("select.seed") == recipe.location("select") == f"{recipe_file}:8:9"


def test_what_is_left_to_the_order_of_the_data_is_written_out(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe.collect.data == recipe.train.data == {"domain": 1.0, "general": 1.0}
    assert recipe.train.learn == ["domain"]
    assert (recipe.learnt_sets, recipe.kept_sets) == (("domain",), ("general",))


def test_learning_every_set_keeps_none(recipe_file):
    recipe = load_recipe(recipe_file, ["train.learn=[domain, general]"])
    assert (recipe.learnt_sets, recipe.kept_sets) == (("domain", "general"), ())


def test_activations_are_recomputed_on_a_gpu_unless_the_recipe_says(recipe_file):
    usual = load_recipe(recipe_file).train
    assert (usual.recomputes_on("cuda"), usual.recomputes_on("cpu")) == (True, False)
    assert not usual.recomputes_on("cuda", is_possible=False)
    for said in (True, False):
        train = load_recipe(recipe_file, [f"train.gradient_checkpointing={str(said).lower()}"]).train
        assert [train.recomputes_on(kind, is_possible=False) for kind in ("cuda", "cpu")] == [said, said]


def test_resolved_says_every_key_and_reads_back_as_itself(recipe_file):
    settings = resolved(load_recipe(recipe_file))
    assert settings["schema"] == 1
    assert settings["select"] == {"strategy": "pca", "top_k": 24, "seed": 0, "components": 20}
    assert settings["train"]["schedule"]["temperature"] == [4.0, 2.0]
    assert settings["validate"]["max_perplexity_increase"] == 0.05
    assert resolved(recipe_from(settings)) == settings


def test_writing_a_default_out_changes_nothing(recipe_file, tmp_path):
    explicit = tmp_path / "explicit.yaml"
    explicit.write_text(
        VALID.replace("top_k: 24}", "top_k: 24, components: 20}")
        + "train: {data: {domain: 1, general: 1}, learn: [domain], learning_rate: 1.0e-5}\n"
    )
    assert resolved(load_recipe(explicit)) == resolved(load_recipe(recipe_file))


def test_whole_numbers_serve_as_numbers_but_not_the_other_way_round(recipe_file):
    assert load_recipe(recipe_file, ["convert.start=1"]).convert.start == 1.0
    assert load_recipe(recipe_file, ["collect.keep_probabilities=1"]).collect.keep_probabilities == 1
    assert load_recipe(recipe_file, ["collect.keep_probabilities=true"]).collect.keep_probabilities is True


def test_aliases_and_a_byte_order_mark_are_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(
        b"\xef\xbb\xbfschema: 1\nmodel: {path: base}\ndata: {domain: &all [{path: a.txt}], general: *all}\n"
    )
    recipe = load_recipe(path, ["data.domain.0.path=b.txt"])
    assert (recipe.data["domain"][0].path, recipe.data["general"][0].path) == ("b.txt", "a.txt")


def test_loading_touches_neither_network_nor_model(recipe_file, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a recipe was loaded over the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("nexus_core.checkpoint.source.open_checkpoint", refuse)
    assert load_recipe(recipe_file).model.path == "models/base"


class TestOverrides:
    def test_replace_a_value(self, recipe_file):
        assert load_recipe(recipe_file, ["train.max_steps=100", "select.top_k=auto"]).train.max_steps == 100

    def test_the_last_one_counts(self, recipe_file):
        assert load_recipe(recipe_file, ["train.seed=1", "train.seed=2"]).train.seed == 2

    def test_values_are_yaml(self, recipe_file):
        recipe = load_recipe(
            recipe_file, ["train.data={domain: 0.9, general: 0.1}", "model.path=a=b", "model.revision="]
        )
        assert recipe.train.data == {"domain": 0.9, "general": 0.1}
        assert (recipe.model.path, recipe.model.revision) == ("a=b", None)

    def test_list_entries_count_from_zero_and_one_past_the_end_appends(self, recipe_file):
        recipe = load_recipe(recipe_file, ["data.domain.0.path=other.jsonl", "data.domain.1.path=more.jsonl"])
        assert [source.path for source in recipe.data["domain"]] == ["other.jsonl", "more.jsonl"]

    def test_a_new_data_set_may_be_named(self, recipe_file):
        recipe = load_recipe(recipe_file, ["data.code=[{path: code.txt}]"])
        assert recipe.train.data == {"domain": 1.0, "general": 1.0, "code": 1.0}

    def test_their_place_is_the_flag(self, recipe_file):
        assert load_recipe(recipe_file, ["select.top_k=8"]).location("select.top_k") == "--set select.top_k=8"

    def test_they_repair_a_broken_value(self, recipe_file):
        recipe_file.write_text(VALID.replace("24", "many"))
        assert load_recipe(recipe_file, ["select.top_k=24"]).select.top_k == 24

    @pytest.mark.parametrize(
        ("assignment", "message"),
        [
            ("train.max_step=100", "train.max_step: unknown key; did you mean 'max_steps'?"),
            ("trian.max_steps=100", "trian: unknown key; did you mean 'train'?"),
            ("max_steps=100", "max_steps: unknown key; it belongs under train"),
            ("train.max_steps=many", "train.max_steps: must be a whole number of at least 1, got the text 'many'"),
            ("train.learning_rate=1e-5", "write 1.0e-5"),
            ("train.max_steps", "has no key and value; write --set KEY=VALUE"),
            ("=3", "has no key and value"),
            ("select={strategy: pca", "select: is not valid YAML"),
            ("schema.version=1", "cannot be set: schema is a single value, not a section"),
            ("data.domain.7.path=a", "cannot be set: data.domain has 1 entry, numbered from 0; write data.domain.0"),
            ("data.domain.path=a", "cannot be set: data.domain has 1 entry"),
            ("data.domain.-1.path=a", "cannot be set: data.domain has 1 entry"),
        ],
    )
    def test_a_mistake_names_the_flag(self, recipe_file, assignment, message):
        with pytest.raises(RecipeError) as raised:
            load_recipe(recipe_file, [assignment])
        (problem,) = raised.value.problems
        assert problem.location == f"--set {assignment}"
        assert message in str(problem)


class TestAgainstTheModel:
    def test_a_recipe_that_fits_has_no_problems(self, recipe_file):
        assert check_against_model(load_recipe(recipe_file, ["select.top_k=16"]), DESCRIPTION) == []

    def test_more_experts_than_the_layer_has(self, recipe_file):
        (problem,) = check_against_model(load_recipe(recipe_file), DESCRIPTION)
        assert str(problem) == (
            f"{recipe_file}:8:32: select.top_k: is 24, but a layer of models/base has 16 experts; "
            "write at most 16, or auto"
        )

    def test_a_converted_model_is_not_a_base(self, recipe_file):
        converted = MoeDescription(**{**vars(DESCRIPTION), "experts": 32, "shared_expert_width": 8})
        (problem,) = check_against_model(load_recipe(recipe_file), converted)
        assert problem.location == f"{recipe_file}:2:15"
        assert "already has a shared expert (8 neurons wide); give the untouched base" in problem.message


class TestFromPython:
    SETTINGS = {"schema": 1, "model": {"path": "base"}, "data": {"domain": [{"path": "a.txt"}]}}  # noqa: RUF012

    def test_plain_data_makes_a_recipe(self):
        recipe = recipe_from(self.SETTINGS, name="mine", overrides=["train.max_steps=3"])
        assert (recipe.name, recipe.train.max_steps, recipe.train.learn) == ("mine", 3, ["domain"])
        assert "train" not in self.SETTINGS

    def test_its_mistakes_are_told_like_a_file_s(self):
        with pytest.raises(RecipeError, match=r"^recipe: modl: unknown key; did you mean 'model'\?$"):
            recipe_from({**self.SETTINGS, "modl": {}})


class TestSectionsFromFlags:
    def test_flags_that_were_not_given_leave_the_default(self):
        select = section_from(Select, {"strategy": "pca", "top_k": None}, ["components=3"])
        assert (select.top_k, select.parameters) == ("auto", {"components": 3})

    def test_strategies_get_their_defaults(self):
        assert section_from(Select, {}).parameters == {"components": 20}
        assert section_from(Convert, {"merge": "top1"}).parameters == {}

    def test_a_mistake_names_the_flag(self):
        with pytest.raises(
            RecipeError, match=r"^--top-k: select.top_k: must be a whole number of at least 1, 'auto', .*, got 0"
        ):
            section_from(Select, {"top_k": 0})
        with pytest.raises(
            RecipeError, match=r"^--set componets=3: select.componets: unknown key; did you mean 'components'"
        ):
            section_from(Select, {}, ["componets=3"])
        with pytest.raises(RecipeError, match=r"^--tokens: collect.tokens: "):
            section_from(Collect, {"tokens": -1})
        with pytest.raises(RecipeError, match=r"^--steps: train.max_steps: must be .*, got 0"):
            section_from(Train, {"max_steps": 0}, flags={"max_steps": "--steps"})
        with pytest.raises(RecipeError, match=r"^--set losses.kl=1: train.losses.kl: there is no loss 'kl'"):
            section_from(Train, {"max_steps": 3}, ["losses.kl=1"])


class _Parameters(BaseModel):
    model_config = ConfigDict(extra="forbid")

    strength: float = Field(0.5, gt=0, description="How much.")
    depth: int = Field(description="How deep.")


class GraftPlugin:
    """A third party's plugin: one merge strategy with parameters."""

    @staticmethod
    @hookimpl
    def nexus_merge_strategies():
        return [Strategy("graft", lambda *_: None, "grafts", _Parameters)]


class TestPluginStrategies:
    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        registered = Plugins()
        registered.register(GraftPlugin(), "third_party", "test")
        monkeypatch.setattr("nexus_core.recipe.strategies.installed", lambda: registered)

    def test_their_parameters_are_checked_and_completed(self, recipe_file):
        recipe = load_recipe(recipe_file, ["convert={merge: graft, depth: 2}"])
        assert recipe.convert.parameters == {"strength": 0.5, "depth": 2}

    def test_a_missing_parameter_is_told(self, recipe_file):
        with pytest.raises(RecipeError, match=r"convert.depth: is missing; write a whole number \(How deep\)"):
            load_recipe(recipe_file, ["convert.merge=graft"])

    def test_types_are_exact_whatever_their_model_says(self, recipe_file):
        with pytest.raises(
            RecipeError, match=r"convert.depth: must be a whole number, got the text '2'; write 2 without"
        ):
            load_recipe(recipe_file, ["convert={merge: graft, depth: '2'}"])

    def test_a_misspelt_parameter_gets_the_nearest_of_section_and_strategy(self, recipe_file):
        with pytest.raises(RecipeError, match=r"convert.strenght: unknown key; did you mean 'strength'\?"):
            load_recipe(recipe_file, ["convert={merge: graft, depth: 2, strenght: 1.0}"])


def test_plugins_are_asked_only_for_strategies(recipe_file, monkeypatch):
    """Loading a recipe must not open embedded files or import model classes."""
    monkeypatch.setattr(Plugins, "embedded", lambda self: pytest.fail("asked for embedded files"))
    monkeypatch.setattr(Plugins, "family", lambda self, *_: pytest.fail("asked for a family"))
    load_recipe(recipe_file, ["model.path=embedded:anything"])
