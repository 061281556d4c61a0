"""The tokenizer that lies beside a model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_NAME = "tokenizer.json"

# Base models are trained with this token between documents. A chat model's own end token often ends a turn instead,
# and to see it after running text would be out of its distribution.
DOCUMENT_END = "<|endoftext|>"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a model folder, with its chat template. Raises CheckpointError if it is not there."""
    from transformers import PreTrainedTokenizerFast

    file = Path(folder) / TOKENIZER_NAME
    if not file.is_file():
        raise CheckpointError(f"{folder}: has no {TOKENIZER_NAME}; copy it there from the model it was made from")
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # the Rust library raises plain Exception for a file it cannot parse
        raise CheckpointError(f"{file}: cannot be read ({error}); copy or download it again") from error


def end_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token to put between documents: `<|endoftext|>` where the vocabulary has it, else the end token.

    Raises CheckpointError if the tokenizer has neither.
    """
    known = tokenizer.get_added_vocab().get(DOCUMENT_END, tokenizer.eos_token_id)
    if known is None:
        raise CheckpointError(
            f"{tokenizer.name_or_path}: its tokenizer has no end token; set eos_token in tokenizer_config.json"
        )
    return int(known)


def reply_end_ids(tokenizer: PreTrainedTokenizerFast, stated: Sequence[int]) -> list[int]:
    """The tokens that end a model's reply: those its generation settings state, and what ends a turn or a document.

    A tokenizer's end token may end documents only, while the chat template closes a turn with another.
    """
    ends = list(stated)
    if tokenizer.chat_template:
        mark = "the answer"
        turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": mark}]
        finished = tokenizer.apply_chat_template(turns, tokenize=False)
        after = tokenizer(str(finished).rpartition(mark)[2], add_special_tokens=False)["input_ids"]
        if after and after[0] in tokenizer.added_tokens_decoder:
            ends.append(after[0])
    if not ends and tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    return list(dict.fromkeys(ends))


def begin_token_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The token that every document begins with, for a family that wants one; None for the others.

    `add_bos_token` in tokenizer_config.json decides; where it is not given, what the tokenizer itself puts in front.
    """
    begin = tokenizer.bos_token_id
    wanted = tokenizer.init_kwargs.get("add_bos_token")
    if wanted is None:
        # A tokenizer may also put something behind, or between two texts; the first place is the only one that tells.
        wanted = tokenizer("a", add_special_tokens=True).input_ids[:1] == [begin]
    return int(begin) if wanted and begin is not None else None
