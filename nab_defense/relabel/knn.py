"""Nearest neighbors: a suspect gets the label that its neighbors among the other samples vote for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..neighbors import neighbors
from ..scan import Scan
from .base import Relabeled, merge, relabelers, trusted_rows

__all__ = ["KNN", "knn_votes"]


def knn_votes(
    queries: NDArray[np.float32], features: NDArray[np.float32], position: NDArray[np.intp], *, k: int
) -> NDArray[np.float32]:
    """Shares of the votes of the k nearest neighbors, each weighted by (1 + cosine) / 2.

    Bahri et al. 2020 (arXiv:2004.12289) take an unweighted plurality by Euclidean distance; weights break its ties.

    Args:
        queries: (S, D), any scale; directions are compared.
        features: (N, D), N >= 1.
        position: (N,), class of each of `features`, in 0 .. K - 1.
        k: Number of neighbors; N where there are fewer.

    Returns:
        (S, K) in [0, 1]; every row sums to 1.
    """
    k = min(k, len(features))
    votes = np.zeros((len(queries), int(position.max()) + 1), dtype=np.float32)
    for block, similarity, neighbor in neighbors(queries, features, k):
        weight = np.maximum((1 + similarity) / 2, np.finfo(np.float32).tiny)  # all neighbors may lie exactly opposite
        np.add.at(votes[block], (np.arange(len(weight))[:, None], position[neighbor]), weight)
        votes[block] /= weight.sum(axis=1, keepdims=True)
    return votes


@relabelers.register("knn", source="arXiv:2004.12289")
@dataclass(frozen=True)
class KNN:
    """Vote of the nearest samples that are not suspects; confidence is the winner's share of the votes.

    Unlike nearest centers it follows a class made of several groups. The price: where an encoder has learned the backdoor,
    poison that was missed outvotes all else, with full confidence; prefer an encoder that poison did not shape.

    Args:
        k: Number of neighbors.
    """

    k: int = 15

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    def relabel(self, scan: Scan, suspect: NDArray[np.bool_]) -> Relabeled:
        rows = trusted_rows(scan, suspect)
        if not suspect.any():
            return merge(scan, suspect, np.zeros(0, np.int64), np.zeros(0, np.float32))
        classes, position = np.unique(scan.labels[rows], return_inverse=True)
        votes = knn_votes(scan.features[suspect], scan.features[rows], position, k=self.k)
        return merge(scan, suspect, classes[votes.argmax(axis=1)], np.minimum(votes.max(axis=1), 1))
