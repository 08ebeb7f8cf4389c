"""Principal components of many rows, read block by block from where they lie."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK", "project"]

BLOCK = 65_536  # rows


def project(features: NDArray[np.float32], rows: NDArray[np.intp], rank: int) -> NDArray[np.float32]:
    """Some rows, centered, on their top principal directions.

    By the eigenvectors of the covariance, which a pass sums up; a singular value decomposition would hold three copies of all
    rows. It squares the spread of the values, so directions whose deviation is less than a thousandth of the largest one are
    lost in float32: none that anybody asks for.

    Args:
        features: (N, D); may be a memory-mapped file.
        rows: (M,), which of them; M >= 1.
        rank: Number of directions, at most D.

    Returns: (M, rank), columns of falling variance, each up to its sign."""
    mean = sum(part.sum(axis=0, dtype=np.float64) for part in _parts(features, rows)) / len(rows)
    shift = np.asarray(mean, dtype=np.float32)
    covariance = np.zeros((features.shape[1],) * 2)
    for part in _parts(features, rows):
        part = part - shift
        covariance += part.T @ part
    directions = np.linalg.eigh(covariance)[1][:, : -rank - 1 : -1].astype(np.float32)
    return np.concatenate([(part - shift) @ directions for part in _parts(features, rows)])


def _parts(features: NDArray[np.float32], rows: NDArray[np.intp]) -> Iterator[NDArray[np.float32]]:
    for first in range(0, len(rows), BLOCK):
        yield features[rows[first : first + BLOCK]]
