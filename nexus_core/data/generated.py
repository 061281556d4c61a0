"""Records of what a model was given and what it wrote, as tokens: written by `generate`, read by the data format of
that name.

Only the ids say it exactly: text need not give the same ones again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nexus_core.data.passages import Written
from nexus_core.data.tokenizers import end_token_id
from nexus_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Fields of a record; beside them stand those that `record_of` names.
PROMPT, COMPLETION = "prompt_tokens", "completion_tokens"


def record_of(
    asked: Any,
    prompt: Sequence[int],
    completion: Sequence[int],
    tokenizer: PreTrainedTokenizerFast,
    *,
    ended: bool,
    continues_text: bool,
) -> dict[str, Any]:
    """The record of one completion.

    asked: what the prompt's own record asks (`formats.opening`), by which it is for training or held out. ended:
    whether the model ended it, rather than the limit. continues_text: whether the prompt was running text, which is
    learnt like any other.
    """
    return {
        "text": said([*prompt, *completion], tokenizer),
        "ended": ended,
        "continues_text": continues_text,
        PROMPT: list(prompt),
        COMPLETION: list(completion),
        "asked": asked,
    }


def generated(record: Mapping[str, Any], fields: Mapping[str, str], tokenizer: PreTrainedTokenizerFast) -> Written:
    """The tokens that a model was given and wrote; what it wrote is learnt, and running text that it went on with.

    The text beside them must be what the tokenizer reads in them, or they are another tokenizer's.
    """
    prompt, completion = (_ids(record, fields.get(name, name)) for name in (PROMPT, COMPLETION))
    text = said([*prompt, *completion], tokenizer)
    if text != record.get("text"):
        raise DataError("its tokens do not say its text, so another model's tokenizer made them; generate it anew")
    # Packing puts the same token behind every document.
    ends = completion[-1:] == [end_token_id(tokenizer)]
    written = completion[: len(completion) - ends]
    learns = [bool(record.get("continues_text"))] * len(prompt) + [True] * len(written)
    return Written(text, [*prompt, *written], learns, learns_end=ends)


def asked_by(record: Mapping[str, Any]) -> Any:
    """What the prompt's own record asks; where that is not told, the prompt."""
    return record.get("asked", record.get(PROMPT))


def said(tokens: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> str:
    """The tokens as text, special ones too."""
    try:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    except (IndexError, OverflowError, TypeError) as error:
        raise DataError(f"its tokens are not of this model's vocabulary ({error})") from error


def _ids(record: Mapping[str, Any], name: str) -> list[int]:
    value = record[name]
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise DataError(f"its field '{name}' is {type(value).__name__}, not a list of token ids")
    return value
