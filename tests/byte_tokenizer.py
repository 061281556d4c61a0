"""A tokenizer whose tokens are single bytes, so that tests can count on their fingers."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for turn in messages %}<|start|>{{ turn['role'] }}<|message|>{{ turn['content'] }}"
    "{% if loop.last and turn['role'] == 'assistant' and not add_generation_prompt %}<|return|>{% else %}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|message|>{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>"]


def byte_tokenizer(*, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens(SPECIAL_TOKENS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, eos_token="<|return|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = chat_template
    return tokenizer
