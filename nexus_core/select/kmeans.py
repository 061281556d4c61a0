"""One expert of every group that routing treats alike."""

# E experts, C clusters

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from nexus_core.select.ranking import LayerStatistics, Ranking, normalised
from nexus_core.types import Strategy

# Clusters where nobody says how many experts are wanted: as many as `top_k: auto` takes at most.
CLUSTERS = 24


class KmeansParameters(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    clusters: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Groups of experts; as many as `top_k` asks for if left out, 24 where that is not a number."
    )
    restarts: Annotated[int, Field(ge=1)] = Field(10, description="Runs from other first centres; the best one counts.")


def kmeans(statistics: LayerStatistics, parameters: KmeansParameters, generator: np.random.Generator) -> Ranking:
    """One expert of each cluster of experts whose probabilities go up and down with the same others'.

    An expert's profile is its row of the correlation matrix of the full softmax; k-means groups the profiles, and a
    cluster is represented by the expert whose profile is nearest to the cluster's centre. Then

        importance[e] = (variance of all experts in e's cluster) / (variance of all experts)

    for a representative and 0 for the others, which come last, those nearest to their centre first.
    Source: Lloyd 1982, first centres by k-means++ (Arthur and Vassilvitskii 2007), as in scikit-learn.
    """
    from sklearn.cluster import KMeans

    variance_E = np.maximum(statistics.covariance.diagonal(), 0.0)
    scale_E = np.sqrt(variance_E)
    # An expert that never varies goes along with nobody.
    scale_E = np.divide(1.0, scale_E, out=np.zeros_like(scale_E), where=scale_E > 0)
    profiles_EE = statistics.covariance * scale_E[:, None] * scale_E
    # More clusters than different profiles would leave some empty.
    different = len(np.unique(profiles_EE.round(12), axis=0))
    clusters = min(parameters.clusters or statistics.wanted or CLUSTERS, different)
    found = KMeans(clusters, n_init=parameters.restarts, random_state=int(generator.integers(2**31))).fit(profiles_EE)
    distance_E = np.linalg.norm(profiles_EE - found.cluster_centers_[found.labels_], axis=1).round(12)
    scores_E = np.zeros(statistics.experts)
    for cluster in range(clusters):
        members = np.flatnonzero(found.labels_ == cluster)
        scores_E[members[distance_E[members].argmin()]] = max(variance_E[members].sum(), np.finfo(float).tiny)
    order = np.lexsort((np.arange(statistics.experts), distance_E, -scores_E))
    return Ranking(normalised(scores_E), order=tuple(order.tolist()))


KMEANS = Strategy(
    name="kmeans",
    function=kmeans,
    summary="one of each group of experts whose probabilities vary alike",
    parameters=KmeansParameters,
    needs=frozenset({"covariance"}),
)
