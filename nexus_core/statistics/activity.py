"""What experts and their neurons do in a running model, recomputed from what went into each layer.

# T tokens, D hidden size
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from nexus_core.plugins import Family
from nexus_core.statistics.listening import HeardLayer
from nexus_core.statistics.moments import RouterStatistics
from nexus_core.statistics.saliency import NeuronSaliency


class ExpertActivity:
    """Adds what a Listener with `keep_inputs` heard to the sums of neurons and experts.

    The family gives every expert dense, one at a time (`nexus_expert_weights`), whatever form the model holds it in;
    its own block does not tell what its neurons put out. So this costs the experts' work a second time.
    """

    def __init__(self, saliency: NeuronSaliency, family: Family, config: Mapping[str, Any], model: nn.Module):
        self.saliency = saliency
        self._hook = family.hook
        self._blocks = {block.layer: block for block in self._hook.nexus_moe_blocks(model=model)}
        self._activations = lambda gate, up: self._hook.nexus_neuron_activations(config=config, gate=gate, up=up)

    def record(self, statistics: RouterStatistics, layer: int, heard: HeardLayer, sets_T: torch.Tensor) -> None:
        """Take one layer of a forward pass; adds to `statistics.output_norm_sum` too.

        sets_T: see `NeuronSaliency.update`; `saliency.count` is to be told of them once for all layers.
        """
        assert heard.inputs is not None
        assert statistics.output_norm_sum is not None
        position = statistics.layers.index(layer)
        read = partial(self._read, layer, heard.inputs.dtype)
        statistics.output_norm_sum[position] += self.saliency.update(
            position, heard.inputs, heard.router, sets_T, read, self._activations
        )

    def _read(self, layer: int, dtype: torch.dtype, expert: int) -> Any:
        return self._hook.nexus_expert_weights(block=self._blocks[layer], expert=expert, dtype=dtype)
