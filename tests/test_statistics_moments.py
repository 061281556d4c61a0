"""Streamed router statistics against loops and numpy on everything at once."""

from __future__ import annotations

import json
import math
import struct

import numpy as np
import pytest
import torch

from nexus_core.errors import ShapeError, UsageError
from nexus_core.statistics import moments
from nexus_core.statistics.moments import RouterStatistics
from nexus_core.types import RouterOutput


def router(tokens: int, experts: int, k: int, seed: int, *, scale: float = 2.0, dtype=torch.float32) -> RouterOutput:
    """Peaked, correlated logits; gate weights as the softmax over the chosen."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, experts, generator=generator)
    logits = (torch.randn(tokens, 6, generator=generator) @ mix * scale / 2).to(dtype)
    values, indices = logits.topk(k)
    return RouterOutput(logits, values.softmax(dim=1), indices)


def streamed(outputs: list[list[RouterOutput]], experts: int) -> RouterStatistics:
    """One list of batches per layer."""
    statistics = RouterStatistics.zeros(range(len(outputs)), experts)
    for position, batches in enumerate(outputs):
        for batch in batches:
            statistics.update(position, batch)
    return statistics


def test_every_figure_is_that_of_an_obvious_loop():
    experts, batches = 8, [router(tokens, 8, 2, seed) for seed, tokens in enumerate((50, 1, 600, 7))]
    statistics = streamed([batches], experts)
    probability, entropy = np.zeros(experts), 0.0
    second, together = np.zeros((experts, experts)), np.zeros((experts, experts), int)
    count, mass = np.zeros(experts, int), np.zeros(experts)
    for batch in batches:
        for logits, weights, indices in zip(batch.logits, batch.weights, batch.indices, strict=True):
            exponentials = [math.exp(logit) for logit in logits.tolist()]
            p = np.array(exponentials) / math.fsum(exponentials)
            probability += p
            second += np.outer(p, p)
            entropy -= sum(share * math.log(share) for share in p)
            for expert, weight in zip(indices.tolist(), weights.tolist(), strict=True):
                count[expert] += 1
                mass[expert] += weight
                for other in indices.tolist():
                    together[expert, other] += 1
    tokens = 658
    assert statistics.tokens == tokens
    close = {"rtol": 0, "atol": 1e-9}
    np.testing.assert_allclose(statistics.mean()[0], probability / tokens, **close)
    np.testing.assert_allclose(statistics.second_moment_sum[0] / tokens, second / tokens, **close)
    np.testing.assert_allclose(statistics.entropy_sum[0] / tokens, entropy / tokens, **close)
    np.testing.assert_allclose(statistics.gate_mass[0], mass, rtol=1e-12)
    np.testing.assert_array_equal(statistics.topk_count[0], count)
    np.testing.assert_array_equal(statistics.coselection[0], together)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("experts", [4, 128])
def test_covariance_is_that_of_the_full_matrix(experts, scale):
    """From routers that hardly prefer anything to ones that are certain."""
    batches = [router(1500, experts, 4, seed, scale=scale) for seed in range(3)]
    statistics = streamed([batches], experts)
    probabilities = np.concatenate([batch.logits.double().softmax(dim=1).numpy() for batch in batches])
    covariance = statistics.covariance()[0].numpy()
    np.testing.assert_allclose(covariance, np.cov(probabilities.T), rtol=0, atol=1e-9)
    # also where all of it is tiny
    np.testing.assert_allclose(covariance, np.cov(probabilities.T), rtol=0, atol=1e-6 * np.abs(covariance).max())
    assert np.array_equal(covariance, covariance.T)


def test_pca_of_the_covariance_is_that_of_scikit_learn():
    from sklearn.decomposition import PCA

    batches = [router(2000, 32, 4, seed) for seed in range(4)]
    probabilities = np.concatenate([batch.logits.double().softmax(dim=1).numpy() for batch in batches])
    pca = PCA(svd_solver="full").fit(probabilities)
    values = np.linalg.eigvalsh(streamed([batches], 32).covariance()[0].numpy())[::-1]
    np.testing.assert_allclose(values / values.sum(), pca.explained_variance_ratio_, rtol=0, atol=1e-7)


def test_merged_shards_are_one_pass():
    layers = [[router(300, 16, 4, seed + 10 * layer) for seed in range(4)] for layer in range(2)]
    whole = streamed(layers, 16)
    merged = streamed([batches[:1] for batches in layers], 16).merge(streamed([batches[1:] for batches in layers], 16))
    for name in ("probability_sum", "second_moment_sum", "gate_mass", "entropy_sum"):
        torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    for name in ("tokens_per_layer", "topk_count", "coselection"):
        assert torch.equal(getattr(merged, name), getattr(whole, name))
    with pytest.raises(ShapeError, match="cannot be merged"):
        whole.merge(RouterStatistics.zeros([0], 16))


def test_masked_tokens_do_not_count():
    batch = router(100, 8, 2, 0)
    keep = torch.arange(100) % 3 != 0
    masked, cut = RouterStatistics.zeros([0], 8), RouterStatistics.zeros([0], 8)
    masked.update(0, batch, keep)
    cut.update(0, RouterOutput(batch.logits[keep], batch.weights[keep], batch.indices[keep]))
    for name in ("tokens_per_layer", "probability_sum", "second_moment_sum", "topk_count", "gate_mass", "coselection"):
        assert torch.equal(getattr(masked, name), getattr(cut, name))
    masked.update(0, batch, torch.zeros(100, dtype=torch.bool))
    assert masked.tokens == cut.tokens == 66


def test_logits_in_bfloat16_and_masked_experts():
    batch = router(64, 8, 2, 1, dtype=torch.bfloat16)
    statistics = RouterStatistics.zeros([0], 8)
    statistics.update(0, batch)
    assert statistics.mean().sum() == pytest.approx(1)
    logits = batch.logits.float()
    logits[:, 3] = -math.inf
    masked = RouterStatistics.zeros([0], 8)
    masked.update(0, RouterOutput(logits, batch.weights, batch.indices))
    without = logits[:, [0, 1, 2, 4, 5, 6, 7]].double()
    expected = torch.distributions.Categorical(logits=without).entropy().mean()
    assert masked.mean_entropy()[0] == pytest.approx(float(expected), abs=1e-12)
    assert masked.mean()[0, 3] == 0


def test_the_router_keeps_its_float64_logits():
    batch = router(64, 8, 2, 1, dtype=torch.float64)
    before = batch.logits.clone()
    RouterStatistics.zeros([0], 8).update(0, batch)
    assert torch.equal(batch.logits, before)


def test_saved_statistics_come_back_the_same(tmp_path):
    statistics = streamed([[router(500, 16, 4, layer)] for layer in range(3)], 16)
    statistics.layers = (1, 3, 5)
    metadata = {"model": "some/model", "tokens_per_set": {"domain": 500}}
    statistics.save(tmp_path / "router_stats.safetensors", metadata)
    for place in (tmp_path, tmp_path / "router_stats.safetensors"):
        loaded, known = RouterStatistics.load(place)
        assert known == metadata
        assert loaded.layers == (1, 3, 5)
        assert torch.equal(loaded.covariance(), statistics.covariance())
        assert torch.equal(loaded.coselection, statistics.coselection)
        assert torch.equal(loaded.gate_mass, statistics.gate_mass)
        assert loaded.tokens == 500


def test_36_layers_of_128_experts_fit_into_5_megabytes(tmp_path):
    RouterStatistics.zeros(range(36), 128).save(tmp_path / "a.safetensors", {})
    assert (tmp_path / "a.safetensors").stat().st_size < 5_000_000


def test_unusable_files_and_uses_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"there are no router statistics; make them with `nexus collect`"):
        RouterStatistics.load(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(struct.pack("<Q", 1000) + b"{")
    with pytest.raises(UsageError, match="not a whole safetensors file"):
        RouterStatistics.load(tmp_path / "cut.safetensors")
    header = json.dumps({}).encode()
    (tmp_path / "other.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UsageError, match="holds no router statistics"):
        RouterStatistics.load(tmp_path / "other.safetensors")
    statistics = RouterStatistics.zeros([0, 1], 8)
    with pytest.raises(ShapeError, match="at least 2 tokens"):
        statistics.covariance()
    with pytest.raises(ShapeError, match=r"router logits are \(4, 16\), not \(tokens, 8\)"):
        statistics.update(0, router(4, 16, 2, 0))
    statistics.update(0, router(4, 8, 2, 0))
    with pytest.raises(ShapeError, match=r"different numbers of tokens: \[4, 0\]"):
        statistics.mean()


def test_small_products_are_not_shared_out_between_threads(monkeypatch):
    """Two threads of OpenBLAS take several times as long over them as one."""
    from threadpoolctl import threadpool_info

    def threads() -> list[int]:
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    during: list[int] = []
    product = moments.second_moment

    def watched(probabilities_TE: torch.Tensor) -> torch.Tensor:
        during.extend(threads())
        return product(probabilities_TE)

    statistics = RouterStatistics.zeros([0], 8)
    statistics.update(0, router(64, 8, 2, 0))  # loads what there is to be limited
    before = threads()
    monkeypatch.setattr(moments, "second_moment", watched)
    statistics.update(0, router(64, 8, 2, 1))
    assert during
    assert set(during) == {1}
    assert threads() == before
