"""What the hooks say that experts and routers compute is what those of the running model compute."""

# T tokens, D hidden size, K experts per token

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from nexus_core.additions import router_tensors
from nexus_core.contract.subject import Subject, disturb, require, require_equal
from nexus_core.statistics.listening import Listener, listen
from nexus_core.types import ExpertWeights, MoeBlock, RouterOutput

# Of an output's norm; float32 sums in another order differ by less than a tenth of it.
TOLERANCE = 1e-5
BASE, CHANGED_ROUTER = "the base", "a changed router"


def check_experts(subject: Subject) -> None:
    """An expert read from disk computes what the running model's expert computes."""
    model, moe = subject.model(), subject.checkpoint.description
    for block in subject.blocks(model):
        hidden_TD = torch.randn(6, moe.hidden_size, generator=torch.Generator().manual_seed(block.layer))
        for expert in sorted({0, 1, moe.experts - 1}):
            weights = subject.hook.nexus_read_expert(
                reader=subject.checkpoint.reader,
                config=subject.checkpoint.config,
                layer=block.layer,
                expert=expert,
                dtype=torch.float32,
            )
            held = subject.hook.nexus_expert_weights(block=block, expert=expert, dtype=torch.float32)
            for name, tensor in vars(weights).items():
                whose = f"layer {block.layer}, expert {expert}, {name}"
                require(
                    (tensor is None) == (getattr(held, name) is None), f"nexus_expert_weights: {whose}: one has none"
                )
                if tensor is not None:
                    require_equal(getattr(held, name), tensor, f"nexus_expert_weights: {whose} against the one on disk")
            if subject.checkpoint.family.answers("nexus_read_expert_rows"):
                _check_rows(subject, block.layer, expert, weights)
            gate = functional.linear(hidden_TD, weights.gate, weights.gate_bias)
            up = functional.linear(hidden_TD, weights.up, weights.up_bias)
            neurons = subject.hook.nexus_neuron_activations(config=subject.checkpoint.config, gate=gate, up=up)
            expected = functional.linear(neurons, weights.down, weights.down_bias)
            found = _expert_output(subject, block, hidden_TD, expert).float()
            error = ((found - expected).norm() / expected.norm()).item()
            whose = f"layer {block.layer}, expert {expert}"
            require(error < TOLERANCE, f"nexus_read_expert: {whose} is off by {error:.2g} from the model's own")


def _check_rows(subject: Subject, layer: int, expert: int, weights: ExpertWeights) -> None:
    """The rows of a matrix that a family reads alone are those of the whole."""
    for projection in ("gate", "up", "down"):
        whole, bias = getattr(weights, projection), getattr(weights, f"{projection}_bias")
        rows = slice(len(whole) // 3, len(whole) - 1)
        found, found_bias = subject.hook.nexus_read_expert_rows(
            reader=subject.checkpoint.reader, config=subject.checkpoint.config, layer=layer, expert=expert,
            projection=projection, rows=rows, dtype=whole.dtype,
        )  # fmt: skip
        where = f"nexus_read_expert_rows: layer {layer}, expert {expert}, {projection}"
        require_equal(found, whole[rows], where)
        require((found_bias is None) == (bias is None), f"{where}: one has a bias")
        if bias is not None:
            require_equal(found_bias, bias[rows], f"{where}, bias")


def _expert_output(subject: Subject, block: MoeBlock, hidden_TD: torch.Tensor, expert: int) -> torch.Tensor:
    """What one expert puts out in the running block: the block's output with all weight on it, less that with none."""
    count = subject.checkpoint.description.experts

    def with_weight(weight: float) -> torch.Tensor:
        def reroute(module: nn.Module, arguments: Any, output: Any) -> Any:
            found: RouterOutput = subject.hook.nexus_router_logits(output=output)
            chosen = torch.arange(expert, expert + found.indices.shape[-1]) % count
            indices, weights = chosen.expand_as(found.indices), torch.zeros_like(found.weights)
            weights[:, 0] = weight
            replaced = {id(found.indices): indices.contiguous(), id(found.weights): weights}
            require(
                isinstance(output, tuple) and replaced.keys() <= {id(item) for item in output},
                "nexus_moe_blocks: the router must return the weights and indices that its block uses, in a tuple",
            )
            return tuple(replaced.get(id(item), item) for item in output)

        handle = block.router.register_forward_hook(reroute)
        try:
            with torch.no_grad():
                output = block.block(hidden_TD[None].to(subject.dtype))
        finally:
            handle.remove()
        return (output[0] if isinstance(output, tuple) else output).reshape(hidden_TD.shape)

    return with_weight(1.0) - with_weight(0.0)


def check_routers(subject: Subject) -> None:
    """The routers that hooks hear are the model's own, and the routing rule alone repeats their choice to the bit.

    With and without a change of the router.
    """
    model = subject.model()
    for state in (BASE, CHANGED_ROUTER):
        with listen(model, subject.checkpoint.family) as listener, torch.no_grad():
            output = model(subject.tokens, use_cache=False, output_router_logits=True)
        layers = subject.checkpoint.description.layers
        require(tuple(listener.routers) == layers, f"nexus_moe_blocks: heard {tuple(listener.routers)}, not {layers}")
        # A model outside transformers may record nothing; then what its routers put out is all there is to know.
        recorded = getattr(output, "router_logits", None) or [heard.logits for heard in listener.routers.values()]
        for own, (layer, router) in zip(recorded, listener.routers.items(), strict=True):
            where = f"{state}, layer {layer}"
            require_equal(router.logits, own.reshape(router.logits.shape), f"nexus_router_logits: {where}")
        _check_rule(subject, model, listener, state)
        if state == BASE:
            subject.hook.nexus_attach_router_delta(model=model)
            disturb(model)


def _check_rule(subject: Subject, model: Any, listener: Listener, state: str) -> None:
    for block in subject.blocks(model):
        heard = listener.routers[block.layer]
        tensors = router_tensors(block.router)
        weights_TK, indices_TK = subject.hook.nexus_gate_weights(
            config=subject.checkpoint.config, logits=heard.logits, router=tensors
        )
        where = f"nexus_gate_weights: {state}, layer {block.layer}"
        require_equal(indices_TK, heard.indices, f"{where}, indices")
        # A family may add a change of the router in another order than the rule: there the last bit may differ.
        rounding = torch.finfo(heard.weights.dtype).eps if state != BASE else 0.0
        off = (weights_TK.to(heard.weights.dtype) - heard.weights).abs().max().item()
        require(off <= rounding, f"{where}, weights: differ by up to {off:.3g}")
        rounding = weights_TK.shape[1] * torch.finfo(weights_TK.dtype).eps
        sums_to_one = bool((weights_TK.float().sum(dim=-1) - 1).abs().max() <= rounding)
        described = subject.checkpoint.description.weights_sum_to_one
        require(sums_to_one or not described, "nexus_describe_moe: weights_sum_to_one, but the gate weights do not")
