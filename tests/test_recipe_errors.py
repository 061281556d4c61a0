"""What a broken recipe is told: for every mistake one sentence with its place and the way out."""

import re
from pathlib import Path

import pytest

from nexus_core.errors import RecipeError
from nexus_core.recipe import load_recipe

VALID = """\
schema: 1
model: {path: models/base}
data:
  domain:
    - path: domain.jsonl
  general:
    - path: general.txt
"""

# The text after VALID (with "replace": instead of its part), line:column, key, and words of the message.
MISTAKES = {
    "misspelt section": ("trian: {max_steps: 1}", "8:1", "trian", "unknown key; did you mean 'train'?"),
    "misspelt key": ("train: {max_step: 100}", "8:9", "train.max_step", "unknown key; did you mean 'max_steps'?"),
    "misspelt key, deeper": (
        "train:\n  schedule:\n    warmup_ration: 0.1",
        "10:5",
        "train.schedule.warmup_ration",
        "unknown key; did you mean 'warmup_ratio'?",
    ),
    "key in the wrong section": ("learning_rate: 0.1", "8:1", "learning_rate", "unknown key; it belongs under train"),
    "text for a whole number": (
        "train: {max_steps: abc}",
        "8:20",
        "train.max_steps",
        "must be a whole number of at least 1, got the text 'abc'",
    ),
    "quoted number": ("train: {max_steps: '100'}", "8:20", "train.max_steps", "write 100 without quotes"),
    "number with commas": ('train: {max_steps: "10,000"}', "8:20", "train.max_steps", "write 10_000"),
    "fraction for a whole number": ("train: {max_steps: 100.0}", "8:20", "train.max_steps", "got 100.0; write 100"),
    "octal that YAML would read": (
        "train: {max_steps: 010}",
        "8:20",
        "train.max_steps",
        "got the text '010'; write 10",
    ),
    "minutes that YAML would read": ("train: {max_steps: 1:30}", "8:20", "train.max_steps", "got the text '1:30'"),
    "number without a point": (
        "train: {learning_rate: 1e-5}",
        "8:24",
        "train.learning_rate",
        "must be a number above 0, got the text '1e-5'; YAML takes 1e-5 for text, write 1.0e-5",
    ),
    "exponent for a whole number": ("collect: {tokens: 1e6}", "8:19", "collect.tokens", "write 1_000_000"),
    "negative number": (
        "train: {learning_rate: -0.1}",
        "8:24",
        "train.learning_rate",
        "must be a number above 0, got -0.1",
    ),
    "zero steps": ("train: {max_steps: 0}", "8:20", "train.max_steps", "must be a whole number of at least 1, got 0"),
    "ratio above one": (
        "train: {schedule: {anneal_start: 1.5}}",
        "8:34",
        "train.schedule.anneal_start",
        "must be a number from 0 to 1, got 1.5",
    ),
    "ratios that add up to more than one": (
        "train:\n  schedule: {warmup_ratio: 0.8, stable_ratio: 0.5}",
        "9:13",
        "train.schedule",
        "warmup_ratio 0.8 and stable_ratio 0.5 add up to more than 1",
    ),
    "infinite rate": (
        "train: {learning_rate: .inf}",
        "8:24",
        "train.learning_rate",
        "must be a number above 0, got inf",
    ),
    "not one of the choices": (
        "model: {path: a, dtype: bflaot16}",
        "replace 2:25",
        "model.dtype",
        "must be 'auto', 'float32' or 'bfloat16', got the text 'bflaot16'; did you mean 'bfloat16'?",
    ),
    "on for text": ("run: {store: on}", "8:14", "run.store", "YAML reads on as true, put it in quotes"),
    "number for text": (
        "model: {path: a, revision: 123}",
        "replace 2:28",
        "model.revision",
        "got 123; put it in quotes",
    ),
    "text for a claim": (
        "collect: {expert_norms: 'yes'}",
        "8:25",
        "collect.expert_norms",
        "must be true or false, got the text 'yes'; write true without quotes",
    ),
    "list for a section": (
        "train:\n  - max_steps: 1",
        "9:3",
        "train",
        "got a list of 1; write 'key: value' lines without dashes",
    ),
    "strategy for its section": ("select: pca", "8:9", "select", "got the text 'pca'; write {strategy: pca}"),
    "empty section": ("train:", "8:7", "train", "got nothing; write a value, or remove the key"),
    "three temperatures": (
        "train: {schedule: {temperature: [4.0, 3.0, 2.0]}}",
        "8:33",
        "train.schedule.temperature",
        "must be a list of 2 numbers, got a list of 3",
    ),
    "unknown selection": (
        "select: {strategy: pcaa}",
        "8:20",
        "select.strategy",
        "there is no selection strategy 'pcaa'; did you mean 'pca'?",
    ),
    "unknown merge": (
        "convert: {merge: average}",
        "8:18",
        "convert.merge",
        "there is no merge strategy 'average'; known: ",
    ),
    "unknown routing": (
        "train: {routing: {strategy: frosen}}",
        "8:29",
        "train.routing.strategy",
        "there is no routing strategy 'frosen'; did you mean 'frozen'?",
    ),
    "unknown sampling": (
        "collect: {sampling: {strategy: even}}",
        "8:32",
        "collect.sampling.strategy",
        "'coverage', 'uniform' or",
    ),
    "misspelt parameter of a strategy": (
        "select: {strategy: pca, componets: 3}",
        "8:25",
        "select.componets",
        "unknown key; did you mean 'components'?",
    ),
    "parameter of another strategy": (
        "select: {strategy: random, components: 3}",
        "8:28",
        "select.components",
        "unknown key",
    ),
    "wrong type of a parameter": (
        "select: {strategy: pca, components: many}",
        "8:37",
        "select.components",
        "must be a whole number of at least 1, got the text 'many'",
    ),
    "unknown loss": ("train: {losses: {lm: 1.0, kl: 1.0}}", "8:27", "train.losses.kl", "there is no loss 'kl'; "),
    "no loss has a weight": ("train: {losses: {lm: 0}}", "8:17", "train.losses", "gives no loss a weight above 0"),
    "missing data set": (
        "train: {data: {domian: 1.0}}",
        "8:16",
        "train.data.domian",
        "there is no data set 'domian' under data; did you mean 'domain'?",
    ),
    "missing data set of collect": (
        "collect: {data: {math: 1.0}}",
        "8:18",
        "collect.data.math",
        "known: domain, general",
    ),
    "learning what is not trained on": (
        "train: {data: {domain: 1.0}, learn: [general]}",
        "8:38",
        "train.learn.0",
        "there is no data set 'general' under train.data; known: domain",
    ),
    "learning nothing": ("train: {learn: []}", "8:16", "train.learn", "names no data set; remove the key"),
    "one name to learn, not in a list": (
        "train: {learn: domain}",
        "8:16",
        "train.learn",
        "write it as a list: [domain]",
    ),
    "unknown data format": (
        "data: {domain: [{path: a, format: mesages}]}",
        "replace 3:35",
        "data.domain.0.format",
        "there is no data format 'mesages'; did you mean 'messages'?",
    ),
    "file for a list of sources": ("data: {domain: a.jsonl}", "replace 3:16", "data.domain", "write [{path: a.jsonl}]"),
    "source without a path": ("data: {domain: [{weight: 2.0}]}", "replace 3:17", "data.domain.0.path", "is missing"),
    "everything held out": (
        "data: {domain: [{path: a, held_out: 1.0}]}",
        "replace 3:37",
        "data.domain.0.held_out",
        "must be a number from 0 to below 1, got 1.0",
    ),
    "data set's name with a point": ("data: {my.set: [{path: a}]}", "replace 3:8", "data.my.set", "rename it"),
    "no data": ("data: {}", "replace 3:7", "data", "names no data set; give at least one"),
    "more processes than sequences": (
        "run: {processes: 5}",
        "8:18",
        "run.processes",
        "is 5, but a step has 4 sequences to share (train.batch_size 1 x train.gradient_accumulation 4); write at most",
    ),
    "offload of what is not in parts": (
        "run: {processes: 2, deepspeed: {zero_stage: 2, offload: parameters}}",
        "8:32",
        "run.deepspeed",
        "zero_stage is 2; write zero_stage: 3, or offload: none",
    ),
    "duplicate key": ("train: {seed: 1}\nrun: {}\ntrain: {}", "10:1", "train", "is given twice, first at "),
    "number as a key": (
        "data: {1: [{path: a}], b: [{path: a}]}",
        "replace 3:8",
        "data",
        "'1' is not read as text; put it",
    ),
    "tag": ("run: {store: !!python/name:os.system x}", "8:14", "run.store", "carries the YAML tag"),
}


def write(folder: Path, mistake: str, place: str) -> Path:
    path = folder / "broken.yaml"
    section = mistake.split(":")[0]
    kept = (
        {"model": "schema: 1\n", "data": "schema: 1\nmodel: {path: models/base}\n"}[section]
        if "replace" in place
        else VALID
    )
    rest = VALID[VALID.index("data:") :] if "replace" in place and section == "model" else ""
    path.write_text(f"{kept}{mistake}\n{rest}")
    return path


@pytest.mark.parametrize(("mistake", "place", "key", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence_with_place_and_remedy(tmp_path, mistake, place, key, message):
    path = write(tmp_path, mistake, place)
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    (problem,) = raised.value.problems
    assert problem.location == f"{path}:{place.removeprefix('replace ')}"
    assert problem.key == key
    assert message in problem.message
    assert str(raised.value) == f"{problem.location}: {key}: {problem.message}"
    assert "\n" not in problem.message
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("version", ["2", "'1'"])
def test_another_schema_version_is_refused(tmp_path, version):
    path = tmp_path / "recipe.yaml"
    path.write_text(VALID.replace("schema: 1", f"schema: {version}"))
    with pytest.raises(RecipeError, match=r"recipe.yaml:1:9: schema: must be 1, got "):
        load_recipe(path)


@pytest.mark.parametrize("missing", ["schema", "model", "data"])
def test_a_missing_required_key_is_told_at_the_top_of_the_file(tmp_path, missing):
    kept = {"schema": "schema: 1\n", "model": "model: {path: a}\n", "data": "data: {d: [{path: a}]}\n"}
    kept.pop(missing)
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(kept.values()))
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    (problem,) = raised.value.problems
    assert (problem.location, problem.key) == (f"{path}:1:1", missing)
    assert problem.message.startswith("is missing; write ")


def test_all_problems_are_told_at_once_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "schema: 1\n"
        "model: {pth: a}\n"
        "data:\n"
        "  domain: [{path: a, wieght: 1.0}]\n"
        "select: {strategy: pac, top_k: some}\n"
        "select: {}\n"
        "train:\n"
        "  learning_rate: 1e-5\n"
        "  data: {math: 1.0}\n"
        "run: {processes: 8}\n"
    )
    with pytest.raises(RecipeError) as raised:
        load_recipe(path, ["train.seed=x", "nonsense"])
    told = [(problem.location.removeprefix(f"{path}:"), problem.key) for problem in raised.value.problems]
    assert told == [
        ("2:1", "model.path"),
        ("2:9", "model.pth"),
        ("4:22", "data.domain.0.wieght"),
        ("5:20", "select.strategy"),
        ("5:32", "select.top_k"),
        ("6:1", "select"),
        ("8:18", "train.learning_rate"),
        ("9:10", "train.data.math"),
        ("10:18", "run.processes"),
        ("--set nonsense", ""),
        ("--set train.seed=x", "train.seed"),
    ]


def test_deepspeed_that_is_missing_is_told_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("nexus_core.recipe.checks.find_spec", lambda name: None)
    load_recipe(write(tmp_path, "run: {processes: 2, deepspeed: {zero_stage: 0}}", "8:1"))
    with pytest.raises(RecipeError, match=r"8:32: run\.deepspeed: needs the package deepspeed.* install it"):
        load_recipe(write(tmp_path, "run: {processes: 2, deepspeed: {zero_stage: 2}}", "8:1"))


def test_no_message_shows_the_validator_behind_it(tmp_path):
    """Pydantic's own words (`Input should be`, `type=`, its URLs) never reach the user."""
    for mistake, place, _, _ in MISTAKES.values():
        with pytest.raises(RecipeError) as raised:
            load_recipe(write(tmp_path, mistake, place))
        assert not re.search(r"Input should|pydantic|type=|Traceback|literal\[|constrained", str(raised.value))
