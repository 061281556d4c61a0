"""What is said of a file that is no recipe at all: missing, unreadable, not YAML, not a mapping."""

import pytest

from nexus_core.errors import RecipeError
from nexus_core.recipe import load_recipe

UNREADABLE = {
    "empty file": ("", "", "is empty; a recipe begins with 'schema: 1'"),
    "only a comment": ("# later\n", "", "is empty"),
    "not a mapping": (
        "- schema: 1\n",
        ":1:1",
        "must be a section with keys schema, model, data and so on, got a list of 1",
    ),
    "tab": ("schema: 1\nmodel:\n\tpath: a\n", ":3:1", "a tab stands where YAML wants spaces; indent with spaces"),
    "open bracket": ("schema: 1\ndata: [a, b\n", ":3:1", "is not valid YAML: while parsing a flow sequence, expected"),
    "open quote": ("schema: 1\nmodel: 'a\n", ":3:1", "check that brackets, braces and quotes are closed"),
    "colon in a value": ("schema: 1\nmodel: a: b\n", ":2:9", "put a value that holds ': ' in quotes"),
    "crooked indentation": ("schema: 1\nmodel: a\n  b: c\n", ":3:4", "check the indentation"),
    "two documents": ("schema: 1\n---\nschema: 1\n", ":2:1", "a recipe is one document"),
    "unknown alias": ("schema: 1\nmodel: *base\n", ":2:8", "found undefined alias 'base'"),
    "alias of itself": ("schema: 1\nmodel: &a [*a]\n", "", "its aliases (*name) unfold without end"),
    "aliases that explode": (
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]\n"
            for last, name in zip("abcdefg", "bcdefgh", strict=True)
        ),
        "",
        "its aliases (*name) unfold without end",
    ),
    "a thousand brackets": ("schema: " + "[" * 5000, "", "is nested too deeply"),
    "control character": ("schema: 1\nmodel: a\x07b\n", ":2:9", "holds the character U+0007"),
}


@pytest.mark.parametrize(("text", "place", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_not_a_recipe_at_all_is_said_in_one_sentence(tmp_path, text, place, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    (problem,) = raised.value.problems
    assert problem.location == f"{path}{place}"
    assert message in problem.message
    assert "\n" not in str(raised.value)


def test_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "mine.yaml").write_text("schema: 1\n")
    with pytest.raises(RecipeError, match=r"mime.yaml: there is no such file; did you mean '.*/mine.yaml'\?"):
        load_recipe(tmp_path / "mime.yaml")


def test_a_folder_is_not_a_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("schema: 1\n")
    with pytest.raises(RecipeError, match=r"is a folder; name a recipe file it holds, e.g. .*mine.yaml$"):
        load_recipe(tmp_path)


def test_bytes_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"schema: 1\n\xff\xfe")
    with pytest.raises(RecipeError, match=r"is not UTF-8 text \(byte 10\)"):
        load_recipe(path)
