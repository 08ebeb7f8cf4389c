"""Nearest neighbors: a sample whose neighbors carry other labels is suspect [Bahri et al. 2020, arXiv:2004.12289]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..neighbors import neighbors
from ..scan import Scan
from ..types import SuspectReport
from .base import detectors, report

__all__ = ["KNN", "knn_disagreement"]


def knn_disagreement(features: NDArray[np.float32], labels: NDArray[np.int64], *, k: int) -> NDArray[np.float32]:
    """Share of a sample's k nearest neighbors that carry another label, each neighbor weighted by its similarity.

    Bahri et al. 2020 keep a sample whose label is its neighbors' plurality (section 3); the share is the score behind
    that verdict. We leave the paper in using cosine similarity s instead of Euclidean distance, and in the weights
    (1 + s) / 2, which break the ties of a plain count.

    Args:
        features: (N, D), any scale; directions are compared. A zero row is equally unlike every other.
        labels: (N,).
        k: Number of neighbors, the sample itself not counted; N - 1 where there are fewer.

    Returns:
        (N,) in [0, 1]; higher is more suspicious; 0 for a sample without any neighbor.
    """
    size = len(labels)
    k = min(k, size - 1)
    if k < 1:
        return np.zeros(size, dtype=np.float32)
    scores = np.zeros(size, dtype=np.float32)
    for block, similarity, neighbor in neighbors(features, features, k + 1):
        # The sample itself need not come first among exact duplicates, nor be there at all: move it last, drop the last.
        others = np.argsort(neighbor == np.arange(size)[block, None], axis=1, kind="stable")[:, :k]
        neighbor = np.take_along_axis(neighbor, others, axis=1)
        weight = (1 + np.take_along_axis(similarity, others, axis=1)) / 2
        weight = np.maximum(weight, np.finfo(np.float32).tiny)  # all neighbors may lie exactly opposite
        disagrees = labels[neighbor] != labels[block, None]
        scores[block] = (weight * disagrees).sum(axis=1) / weight.sum(axis=1)
    return scores


@detectors.register("knn", source="arXiv:2004.12289")
@dataclass(frozen=True)
class KNN:
    """Label disagreement among nearest neighbors.

    Needs features that poison did not shape (a pretrained or self-supervised encoder): a network that has learned the
    backdoor puts poison beside poison, with the same label.

    Args:
        k: Number of neighbors.
    """

    k: int = 15

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def detect(self, scan: Scan) -> SuspectReport:
        return report(scan, knn_disagreement(scan.features, scan.labels, k=self.k), self)
