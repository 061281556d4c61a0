"""The embedded model's tokenizer: byte-level BPE with the special tokens and the turn format of harmony."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 2048
SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)

CHAT_TEMPLATE = """\
{%- for turn in messages -%}
    {{- '<|start|>' ~ turn['role'] ~ '<|message|>' ~ turn['content'] -}}
    {%- if loop.last and turn['role'] == 'assistant' and not add_generation_prompt -%}
        {{- '<|return|>' -}}
    {%- else -%}
        {{- '<|end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start|>assistant<|message|>' -}}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of 2048 tokens, the special ones last as in the official vocabulary; digits stand alone."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|startoftext|>",
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=131072,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def chat(tokenizer: PreTrainedTokenizerFast, prompt: str, response: str) -> str:
    """One finished exchange in the model's turn format."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


@cache
def byte_lengths(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Bytes of text each token stands for; the special ones stand for none."""
    # The byte-level alphabet writes every byte as one character.
    return tuple(
        0 if token in SPECIAL_TOKENS else len(token)
        for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    )
