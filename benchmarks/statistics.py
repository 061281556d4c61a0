"""Router statistics for PCA: streamed second moments against storing every probability and running scikit-learn."""

from __future__ import annotations

import torch

from benchmarks.measurement import Measurement, compared
from nexus_core.statistics.moments import RouterStatistics
from nexus_core.types import RouterOutput

TOKENS, EXPERTS, EXPERTS_PER_TOKEN, BATCH = 65_536, 128, 4, 4_096


def run() -> list[Measurement]:
    """One layer of gpt-oss-120b's 128 experts; relative to scikit-learn's PCA on the stored matrix."""
    from sklearn.decomposition import PCA

    generator = torch.Generator().manual_seed(0)
    logits_TE = 2 * torch.randn(TOKENS, EXPERTS, generator=generator)
    weights_TK, indices_TK = torch.topk(logits_TE, EXPERTS_PER_TOKEN, dim=-1)
    weights_TK = weights_TK.softmax(dim=-1)

    def streamed() -> None:
        statistics = RouterStatistics.zeros([0], EXPERTS)
        for start in range(0, TOKENS, BATCH):
            batch = slice(start, start + BATCH)
            statistics.update(0, RouterOutput(logits_TE[batch], weights_TK[batch], indices_TK[batch]))
        torch.linalg.eigh(statistics.covariance()[0])

    def stored() -> None:
        batches = [logits_TE[s : s + BATCH].softmax(dim=-1) for s in range(0, TOKENS, BATCH)]
        PCA(n_components=20, svd_solver="covariance_eigh").fit(torch.cat(batches).numpy())

    def note(bytes_per_layer: float) -> str:
        return f"{36 * bytes_per_layer / 1e6:,.1f} MB for 36 layers at 1M tokens"

    triangle_bytes = 8 * EXPERTS * (EXPERTS + 1) / 2
    return compared(
        f"router statistics and PCA, {TOKENS:,} tokens of one layer with {EXPERTS} experts",
        {"stored float32, scikit-learn": stored, "nexus, streamed (all statistics)": streamed},
        against="stored float32, scikit-learn",
        notes={
            "stored float32, scikit-learn": note(1e6 * EXPERTS * 4),
            "nexus, streamed (all statistics)": note(2 * triangle_bytes),
        },
        rounds=5,
    )
