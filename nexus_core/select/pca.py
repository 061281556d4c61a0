"""Principal components of the router's probabilities."""

# E experts, C components

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from nexus_core.select.ranking import LayerStatistics, Ranking, normalised
from nexus_core.types import Strategy


class PcaParameters(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    components: Annotated[int, Field(ge=1)] = Field(
        20, description="Principal components counted, at most; fewer if the layer has fewer experts."
    )


def pca(statistics: LayerStatistics, parameters: PcaParameters, generator: np.random.Generator) -> Ranking:
    """Experts by their part in the directions along which routing varies most from token to token.

    With v_i the unit eigenvectors of the covariance of the full softmax and r_i their share of its total variance,

        importance[e]  proportional to  sum over the first C components i of |v_i[e]| * r_i

    which is what scikit-learn's PCA gives on the matrix of all probabilities (`components_`,
    `explained_variance_ratio_`), here from the second moments alone. C is at most E and one less than the tokens.
    Source: the first published scripts of this method, github.com/eous/nexus.
    """
    variance_E, vectors_EE = np.linalg.eigh(statistics.covariance)
    components = max(1, min(parameters.components, statistics.experts, statistics.tokens - 1))
    # eigh gives ascending eigenvalues, vectors in columns; probabilities sum to 1, so the last one is zero up to
    # rounding and may come out just below it.
    largest = np.argsort(-variance_E, kind="stable")[:components]
    variance_E = np.maximum(variance_E, 0.0)
    total = variance_E.sum()
    share_C = variance_E[largest] / total if total > 0 else np.zeros(components)
    return Ranking(
        importance=normalised(np.abs(vectors_EE[:, largest]) @ share_C),
        explained_variance=tuple(float(share) for share in share_C),
    )


PCA = Strategy(
    name="pca",
    function=pca,
    summary="by their part in the directions along which routing varies most",
    parameters=PcaParameters,
    needs=frozenset({"covariance"}),
)
