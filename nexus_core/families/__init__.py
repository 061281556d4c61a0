"""What family plugins share whose model code is transformers' own: layouts, routing rules, extended models, hooks.

A family that keeps its experts in fused tensors and its router in a module of its own is one `Layout`, given to
`TransformersFamilies`, which answers every family hook for it:

    families = TransformersFamilies(Layout(model_type="my_moe", ...))

and `my_moe = "my_package:families"` in the entry-point group `nexus.plugins` makes it known. Importing this package
brings neither torch nor transformers.
"""

from nexus_core.families.hooks import TransformersFamilies
from nexus_core.families.layout import Fused, Layout, PerExpert, after_dense_layers, every_layer
from nexus_core.families.rules import (
    group_limited_sigmoid,
    softmax_of_top_k,
    sums_to_one_if_unscaled,
    top_k_of_softmax,
)

__all__ = [
    "Fused",
    "Layout",
    "PerExpert",
    "TransformersFamilies",
    "after_dense_layers",
    "every_layer",
    "group_limited_sigmoid",
    "softmax_of_top_k",
    "sums_to_one_if_unscaled",
    "top_k_of_softmax",
]
