"""The configuration of a GPT-OSS whose experts stay packed, with or without a shared expert."""

from __future__ import annotations

from typing import Any

from transformers import GptOssConfig

from nexus_gpt_oss.checkpoint import CONVERTED_MODEL_TYPE, STORAGE


class NexusGptOssConfig(GptOssConfig):
    """GptOssConfig and what NEXUS adds.

    shared_expert_width: neurons of each layer's shared expert, 0 for none. has_router_delta: whether each router has a
    learned change. expert_storage: always "mxfp4". There never is a quantization_config: transformers would answer it
    by building dense experts or asking for a GPU kernel.
    """

    model_type = CONVERTED_MODEL_TYPE
    shared_expert_width: int = 0
    has_router_delta: bool = False
    expert_storage: str = STORAGE

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("quantization_config", None)
        super().__post_init__(**kwargs)
