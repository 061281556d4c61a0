"""GPT-OSS written down plainly, in float32, one expert and one head at a time: what the plugin must equal.

After the published architecture (the model card, arXiv 2508.10925, and github.com/openai/gpt-oss); no code is shared
with the plugin or with transformers. Reads a checkpoint folder in the official layout directly.

    # S sequence length, D hidden size, H head size
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


class ReferenceGptOss:
    """Logits (S, V) of token ids (S,) from a checkpoint folder."""

    def __init__(self, folder: Path):
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.tensors: dict[str, torch.Tensor] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            self.tensors |= load_file(shard)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        stream = self.number("model.embed_tokens.weight")[ids]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            stream = stream + self.attention(self.norm(stream, prefix + "input_layernorm"), layer)
            stream = stream + self.mixture(self.norm(stream, prefix + "post_attention_layernorm"), layer)
        return self.norm(stream, "model.norm") @ self.number("lm_head.weight").T

    def number(self, name: str) -> torch.Tensor:
        return self.tensors[name].float()

    def linear(self, inputs: torch.Tensor, name: str) -> torch.Tensor:
        return inputs @ self.number(name + ".weight").T + self.number(name + ".bias")

    def norm(self, inputs: torch.Tensor, name: str) -> torch.Tensor:
        mean_square = (inputs**2).mean(dim=-1, keepdim=True)
        return inputs / torch.sqrt(mean_square + self.config["rms_norm_eps"]) * self.number(name + ".weight")

    def attention(self, inputs: torch.Tensor, layer: int) -> torch.Tensor:
        prefix = f"model.layers.{layer}.self_attn."
        head_dim, queries = self.config["head_dim"], self.config["num_attention_heads"]
        queries_per_key = queries // self.config["num_key_value_heads"]
        length = len(inputs)
        q, k, v = (self.linear(inputs, prefix + f"{name}_proj").view(length, -1, head_dim) for name in "qkv")
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        visible = distance >= 0
        if layer % 2 == 0:
            visible &= distance < self.config["sliding_window"]
        heads = []
        for head in range(queries):
            query_SH = self.rotate(q[:, head])
            key_SH = self.rotate(k[:, head // queries_per_key])
            scores = (query_SH @ key_SH.T / math.sqrt(head_dim)).masked_fill(~visible, -math.inf)
            # The sink is one more thing to look at, that gives nothing back.
            sink = self.number(prefix + "sinks")[head].expand(length, 1)
            shares = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[:, :-1]
            heads.append(shares @ v[:, head // queries_per_key])
        return self.linear(torch.cat(heads, dim=-1), prefix + "o_proj")

    def rotate(self, vectors_SH: torch.Tensor) -> torch.Tensor:
        """YaRN (arXiv 2309.00071): slow frequencies are interpolated, fast ones kept, all vectors lengthened."""
        half = vectors_SH.shape[1] // 2
        base, scaling = self.config["rope_theta"], self.config["rope_scaling"]
        factor, context = scaling["factor"], scaling["original_max_position_embeddings"]

        def dimension_of(turns: float) -> float:
            return half * math.log(context / (turns * 2 * math.pi)) / math.log(base)

        fastest, slowest = dimension_of(scaling["beta_fast"]), dimension_of(scaling["beta_slow"])
        angles = []
        for dimension in range(half):
            frequency = base ** (-dimension / half)
            interpolated = min(max((dimension - fastest) / (slowest - fastest), 0.0), 1.0)
            angles.append(frequency * (1 - interpolated) + frequency / factor * interpolated)
        turned = torch.arange(len(vectors_SH))[:, None] * torch.tensor(angles)[None, :]
        concentration = 0.1 * math.log(factor) + 1.0
        cos, sin = turned.cos() * concentration, turned.sin() * concentration
        first, second = vectors_SH[:, :half], vectors_SH[:, half:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def mixture(self, inputs: torch.Tensor, layer: int) -> torch.Tensor:
        logits = self.linear(inputs, f"model.layers.{layer}.mlp.router")
        output = torch.zeros_like(inputs)
        for token, (hidden, row) in enumerate(zip(inputs, logits, strict=True)):
            chosen = row.argsort(descending=True)[: self.config["num_experts_per_tok"]]
            for expert, weight in zip(chosen.tolist(), row[chosen].softmax(dim=0), strict=True):
                output[token] += weight * self.expert(hidden, layer, expert)
        return output

    def expert(self, hidden: torch.Tensor, layer: int, expert: int) -> torch.Tensor:
        gate_up = self.matrix(layer, "gate_up_proj", expert) @ hidden
        gate_up = gate_up + self.number(f"model.layers.{layer}.mlp.experts.gate_up_proj_bias")[expert]
        limit = self.config["swiglu_limit"]
        gate, up = gate_up[0::2].clamp(max=limit), gate_up[1::2].clamp(-limit, limit)
        activated = gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
        bias = self.number(f"model.layers.{layer}.mlp.experts.down_proj_bias")[expert]
        return self.matrix(layer, "down_proj", expert) @ activated + bias

    def matrix(self, layer: int, name: str, expert: int) -> torch.Tensor:
        """One expert's matrix, rows as stored."""
        prefix = f"model.layers.{layer}.mlp.experts.{name}"
        blocks, scales = self.tensors[prefix + "_blocks"][expert], self.tensors[prefix + "_scales"][expert]
        nibbles = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
        numbers = FP4[nibbles.long()] * 2.0 ** (scales.float() - 127)[..., None]
        return numbers.flatten(-2)
