"""Many rows, read block by block from where they lie: standardized, and on their principal directions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler

__all__ = ["BLOCK", "Rows", "Standardized", "along", "directions", "project"]

BLOCK = 65_536  # rows


class Rows(Protocol):
    """(N, D), of which some rows can be had."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: NDArray[np.intp], /) -> NDArray[np.float32]: ...


class Standardized:
    """Tables of one row per sample, side by side, standardized. Neither of them is ever copied whole.

    Args:
        tables: (N, D) float each; may be memory-mapped files.
    """

    def __init__(self, *tables: NDArray[np.float32]) -> None:
        self.tables = [(table, _fitted(table)) for table in tables]
        self.shape = len(tables[0]), sum(table.shape[1] for table in tables)

    def __getitem__(self, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """rows: (M,). Returns: (M, D of all tables)."""
        return np.concatenate([scaler.transform(table[rows]) for table, scaler in self.tables], axis=1)


def _fitted(table: NDArray[np.float32]) -> StandardScaler:
    scaler = StandardScaler()
    for first in range(0, len(table), BLOCK):
        scaler.partial_fit(table[first : first + BLOCK])
    return scaler


def project(features: Rows, rows: NDArray[np.intp], rank: int) -> NDArray[np.float32]:
    """Some rows, centered, on their top principal directions: along what directions() gives, see there.

    Returns: (M, rank), columns of falling variance, each up to its sign."""
    return along(features, rows, *directions(features, rows, rank))


def directions(features: Rows, rows: NDArray[np.intp], rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The mean of some rows, and their top principal directions.

    By the eigenvectors of the covariance, which a pass sums up; a singular value decomposition would hold three copies of all
    rows. It squares the spread of the values, so directions whose deviation is less than a thousandth of the largest one are
    lost in float32: none that anybody asks for.

    Args:
        features: (N, D); may be a memory-mapped file.
        rows: (M,), which of them; M >= 1.
        rank: Number of directions, at most D.

    Returns: (D,) and (D, rank), of falling variance, each up to its sign."""
    mean = sum(part.sum(axis=0, dtype=np.float64) for part in _parts(features, rows)) / len(rows)
    shift = np.asarray(mean, dtype=np.float32)
    covariance = np.zeros((features.shape[1],) * 2)
    for part in _parts(features, rows):
        part = part - shift
        covariance += part.T @ part
    return shift, np.linalg.eigh(covariance)[1][:, : -rank - 1 : -1].astype(np.float32)


def along(
    features: Rows, rows: NDArray[np.intp], mean: NDArray[np.float32], directions: NDArray[np.float32]
) -> NDArray[np.float32]:
    """(M, rank) of some rows less a mean (D,), along directions (D, rank)."""
    return np.concatenate([(part - mean) @ directions for part in _parts(features, rows)])


def _parts(features: Rows, rows: NDArray[np.intp]) -> Iterator[NDArray[np.float32]]:
    for first in range(0, len(rows), BLOCK):
        yield features[rows[first : first + BLOCK]]
