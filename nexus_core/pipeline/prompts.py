"""What the base will be given to complete, before it is: how many prompts, and how long they are."""

from __future__ import annotations

from nexus_core.checkpoint.source import Checkpoint
from nexus_core.data.prompts import read_prompts
from nexus_core.data.records import load_records, locate
from nexus_core.data.tokenizers import load_tokenizer
from nexus_core.errors import CheckpointError
from nexus_core.estimate import Prompts
from nexus_core.recipe.schema import Generate, Recipe, Records
from nexus_core.stages.stage import reads_generated

# Of so many records of a source the prompts are made, to see how long they are: about a second.
SAMPLED_RECORDS = 2_000


def look_at_prompts(
    recipe: Recipe, checkpoint: Checkpoint, *, counted: bool = True
) -> tuple[dict[str, Prompts], tuple[str, ...]]:
    """The prompts by name under `generate`, and a sentence for each source that does not tell how many it has; both
    empty if the recipe has no such stage.

    counted: False reads no more records than lengths are taken from, where only memory matters. Raises DataError if a
    source is missing or has no prompt.
    """
    found, notes = {}, []
    for name, item in recipe.generate.items() if reads_generated(recipe, recipe.data) else ():
        lengths = _lengths(item, checkpoint)
        counts = [(source.path, count_records(source) if counted else None) for source in item.prompts]
        unknown = [path for path, count in counts if count is None]
        count = sum(count or 0 for _, count in counts)
        found[name] = Prompts(count, max(lengths), sum(lengths) / len(lengths), is_all=not unknown)
        notes += [
            f"generate.{name}: how many records {path} has is not known before they are read, so the time they take is "
            "not counted; with max_records it would be"
            for path in unknown
            if counted
        ]
    return found, tuple(notes)


def count_records(source: Records) -> int | None:
    """Records of a source, counted where it lies here; of a Hub data set its `max_records`, or None.

    Raises DataError if there is no such source.
    """
    return source.max_records if locate(source.path) is None else sum(1 for _ in load_records(source))


def _lengths(item: Generate, checkpoint: Checkpoint) -> list[int]:
    """Tokens of the first prompts of every source; the most there may be of a source that is not here, and of all if
    there is no tokenizer yet.
    """
    try:
        tokenizer = load_tokenizer(checkpoint.folder)
    except CheckpointError:
        return [item.max_prompt_tokens]
    lengths: list[int] = []
    for source in item.prompts:
        if locate(source.path) is None:
            lengths.append(item.max_prompt_tokens)
            continue
        most = min(source.max_records or SAMPLED_RECORDS, SAMPLED_RECORDS)
        prompts, _ = read_prompts([source.model_copy(update={"max_records": most})], tokenizer, item.max_prompt_tokens)
        lengths += [len(prompt.tokens) for prompt in prompts]
    return lengths
