"""Activation clustering: poison is the smaller of two clusters within its class [Chen et al. 2018, arXiv:1811.03728]."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score

from ..neighbors import cluster
from ..principal import BLOCK, project
from ..scan import Scan
from ..types import SuspectReport
from .base import detectors, report

__all__ = ["ActivationClustering", "Split", "split_class", "two_means"]

log = logging.getLogger(__name__)
Points = NDArray[np.float32]
MIN_CLASS = 30  # fewer samples than this split well by chance
NUM_RESTARTS = 8
NUM_NULLS = 5
SILHOUETTE_ROWS = 2000  # a silhouette needs all pairwise distances


class Split(NamedTuple):
    """How one class falls into two clusters.

    Args:
        margin: (N,) in [-1, 1], > 0 in the smaller cluster, by relative distance to the two centers.
        fraction: Share of the smaller cluster, in [0, 0.5].
        silhouette: Mean silhouette of the two clusters, in [-1, 1].
        null: The same for a single Gaussian group of the class's size and covariance.
    """

    margin: Points
    fraction: float
    silhouette: float
    null: float


def two_means(points: Points, *, seed: int) -> Points:
    """Distances (N, 2) to the centers of the best of several seeded 2-means runs; N >= 2."""
    centers = cluster(points, 2, seed=seed, restarts=NUM_RESTARTS)
    return np.asarray(np.linalg.norm(points[:, None] - centers, axis=2), dtype=np.float32)


def _silhouette(points: Points, near: NDArray[np.bool_], seed: int) -> float:
    rows = np.random.default_rng(seed).permutation(len(points))[:SILHOUETTE_ROWS]
    if len(np.unique(near[rows])) < 2:
        return 0.0
    return float(silhouette_score(points[rows], near[rows]))


def split_class(features: Points, *, dims: int, seed: int) -> Split:
    """Reduce one class to its top principal components, cut it in two, and do the same to a single Gaussian.

    Clean classes split too; the question is whether they split better than one group would. The answer is a parametric
    bootstrap, as in SigClust [Liu et al. 2008, JASA 103(483)] with the silhouette in place of its cluster index: 2-means
    on Gaussian samples of the same size and covariance. An elongated class has an elongated null.

    Args:
        features: (N, D), N >= 2; any scale.
        dims: Number of principal components. Chen et al. take independent components, which they whiten; we keep the
            variances, as a direction in which poison lies apart is one of large variance, and one of small variance with a
            skewed tail then cannot decide the split. Hence poison must lie farther off than its class is long.
        seed: Seeds the clusterings, the null samples and the silhouette's subsample.
    """
    dims = min(dims, *features.shape)
    if len(features) > BLOCK:
        points = project(features, np.arange(len(features)), dims)
    else:
        points = np.ascontiguousarray(PCA(dims, random_state=seed).fit_transform(features), dtype=np.float32)
    distance = two_means(points, seed=seed)
    near = distance[:, 0] < distance[:, 1]
    if near.mean() > 0.5:
        near, distance = ~near, distance[:, ::-1]
    margin = (distance[:, 1] - distance[:, 0]) / np.maximum(distance.sum(axis=1), np.finfo(np.float32).tiny)

    rng, nulls = np.random.default_rng(seed), []
    for _ in range(NUM_NULLS):  # principal components are uncorrelated: their deviations are the covariance
        sample = (rng.standard_normal(points.shape) * points.std(axis=0)).astype(np.float32)
        closer = np.less(*two_means(sample, seed=seed).T)
        nulls.append(_silhouette(sample, closer, seed))
    return Split(margin, float(near.mean()), _silhouette(points, near, seed), max(nulls))


@detectors.register("activation_clustering", source="arXiv:1811.03728")
@dataclass(frozen=True)
class ActivationClustering:
    """Two clusters a class; the smaller one is suspect where the class has two groups rather than one.

    Scores: in (0, 1] for the smaller cluster of an accused class, in [-1, 0] for the rest of that class, in [-3, -1] for
    every other class; nobody is accused where no score exceeds 0. Poison whose share of its class reaches `max_fraction`
    is not the smaller cluster meant here, so it goes unseen, as in the paper. All-to-one poison among 10 balanced classes
    reaches .35 of the target class at a poison rate of 5 %, and one half at 1 / 11.

    Args:
        dims: Number of principal components to cluster in.
        max_fraction: Largest share of a class that the suspect cluster may have; in (0, 0.5].
        min_excess: By how much the silhouette must exceed that of a single Gaussian group. Above 0 because the clean
            classes of a trained network are single groups with skewed tails, not quite Gaussian.
        seed: Seeds clustering and null samples.
    """

    dims: int = 10
    max_fraction: float = 0.35
    min_excess: float = 0.08
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dims < 1:
            raise ValueError(f"dims must be at least 1, got {self.dims}")
        if not 0 < self.max_fraction <= 0.5:
            raise ValueError(f"max_fraction must be in (0, 0.5], got {self.max_fraction}")

    def accuses(self, split: Split) -> bool:
        return split.fraction < self.max_fraction and split.silhouette > split.null + self.min_excess

    def detect(self, scan: Scan) -> SuspectReport:
        scores = np.full(len(scan), -2, dtype=np.float32)
        for label in np.unique(scan.labels):
            rows = np.flatnonzero(scan.labels == label)
            features = scan.features[rows]
            if len(rows) < MIN_CLASS or (features == features[0]).all():
                continue
            split = split_class(features, dims=self.dims, seed=self.seed)
            accused = self.accuses(split)
            scores[rows] = split.margin if accused else split.margin - 2
            log.info(
                "class %d %s: smaller cluster %.3f of it, silhouette %.3f, single Gaussian %.3f",
                label, "accused" if accused else "cleared", *split[1:],
            )  # fmt: skip
        return report(scan, scores, self)
