"""Router statistics of a made-up layer, and a strategy's ranking of its experts."""

from __future__ import annotations

import numpy as np

from nexus_core.select import STRATEGIES, LayerStatistics, Ranking

# T tokens, E experts


def probabilities(tokens: int, experts: int, seed: int = 0) -> np.ndarray:
    """A softmax (T, E) whose logits depend on a few shared factors, as a real router's do."""
    generator = np.random.default_rng(seed)
    factors = generator.normal(size=(tokens, 6)) @ (
        generator.normal(size=(6, experts)) * generator.gamma(1, 1, experts)
    )
    logits_TE = factors + generator.normal(size=experts) + 0.3 * generator.normal(size=(tokens, experts))
    exponentials_TE = np.exp(logits_TE - logits_TE.max(axis=1, keepdims=True))
    return exponentials_TE / exponentials_TE.sum(axis=1, keepdims=True)


def statistics_of(probabilities_TE: np.ndarray, top_k: int = 4) -> LayerStatistics:
    tokens, experts = probabilities_TE.shape
    chosen_TK = np.argsort(-probabilities_TE, axis=1)[:, :top_k]
    weights_TK = np.take_along_axis(probabilities_TE, chosen_TK, axis=1)
    weights_TK = weights_TK / weights_TK.sum(axis=1, keepdims=True)
    return LayerStatistics(
        layer=0,
        tokens=tokens,
        mean=probabilities_TE.mean(axis=0),
        covariance=np.cov(probabilities_TE.T),
        topk_count=np.bincount(chosen_TK.ravel(), minlength=experts),
        gate_mass=np.bincount(chosen_TK.ravel(), weights=weights_TK.ravel(), minlength=experts),
        output_norm_sum=np.bincount(chosen_TK.ravel(), weights=2 * weights_TK.ravel(), minlength=experts),
    )


def rank(name: str, statistics: LayerStatistics, seed: int = 0) -> Ranking:
    strategy = next(strategy for strategy in STRATEGIES if strategy.name == name)
    parameters = strategy.parameters() if strategy.parameters else None
    return strategy.function(statistics, parameters, np.random.default_rng(seed))
