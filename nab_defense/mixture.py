"""Two groups in a line of values, if there are two."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits

__all__ = ["ONE_THREAD", "split_in_two"]

ONE_THREAD = threadpool_limits.wrap(limits=1)  # many small products, which two threads that wait for each other make slower


@ONE_THREAD
def split_in_two(values: NDArray[Any], means: tuple[float, float] | None = None) -> tuple[NDArray[np.float64], float, float]:
    """Fit a mixture of two normals to (M,) values. `means`: where to start; None: k-means tells, which overlooks a few.

    Returns: (M,) probability of the higher group, which never falls with the value; Ashman's
    D = |m1 - m2| / sqrt((s1^2 + s2^2) / 2); depth of the valley of the fitted density between the means relative to the lower
    of its ends, in [0, 1]; zeros where all values are the same."""
    column = np.asarray(values, dtype=np.float64)[:, None]
    if np.ptp(column) == 0:
        return np.zeros(len(column)), 0.0, 0.0
    start = None if means is None else np.array(means)[:, None]
    mixture = GaussianMixture(2, random_state=0, means_init=start).fit(column)
    centers, variances = mixture.means_[:, 0], mixture.covariances_[:, 0, 0]
    separation = abs(centers[0] - centers[1]) / np.sqrt(variances.mean())
    density = np.exp(mixture.score_samples(np.linspace(centers.min(), centers.max(), 200)[:, None]))
    valley = 1 - density.min() / min(density[0], density[-1])
    likely = mixture.predict_proba(column)[:, centers.argmax()]
    likely[column[:, 0] > centers.max()] = 1  # of two normals the wider one wins in both tails
    likely[column[:, 0] < centers.min()] = 0
    return likely, float(separation), float(np.clip(valley, 0, 1))
