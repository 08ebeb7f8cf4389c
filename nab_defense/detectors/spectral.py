"""Spectral signatures: poison that moves a class's features leaves a large singular value [Tran et al. 2018]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..principal import BLOCK, project
from ..scan import Scan
from ..types import SuspectReport
from .base import detectors, report

__all__ = ["Spectral", "class_spectral_scores", "spectral_scores"]


def spectral_scores(features: Tensor, *, rank: int = 1) -> Tensor:
    """Squared projection on the top singular directions of centered features [Tran et al. 2018, Alg. 1].

    Args:
        features: (N, D), one class, any scale; N >= 1.
        rank: How many directions; their squared projections add up. The paper uses 1.

    Returns:
        (N,), >= 0; higher is more suspicious. Unchanged by a shift or a rotation of the features.
    """
    centered = features - features.mean(dim=0)
    directions = torch.linalg.svd(centered, full_matrices=False).Vh[:rank]
    return (centered @ directions.T).square().sum(dim=1)


def class_spectral_scores(features: NDArray[np.float32], labels: NDArray[np.int64], *, rank: int = 1) -> NDArray[np.float32]:
    """Spectral scores class by class, each in units of its class's mean score.

    The paper removes the same number from every class, so it never compares classes. One ranking over all samples
    must, and raw scores would favor whichever class has the largest features; hence we leave the paper and divide by
    the class mean. A score then reads "times the variance of its class along that direction", with mean 1 per class:
    a minority of poison stands out, but where more than about half of a class is poison, its clean part does.

    Args:
        features: (N, D).
        labels: (N,), any integers.
        rank: How many singular directions.

    Returns:
        (N,), >= 0; 0 throughout a class that has fewer than 3 samples or no spread.
    """
    scores = np.zeros(len(labels), dtype=np.float32)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < 3:  # any two points lie on a line: nothing can stand out
            continue
        if len(rows) > BLOCK:
            raw = np.square(project(features, rows, rank)).sum(axis=1)
        else:
            raw = spectral_scores(torch.from_numpy(features[rows]), rank=rank).numpy()
        if raw.mean() > 0:
            scores[rows] = raw / raw.mean()
    return scores


@detectors.register("spectral", source="arXiv:1811.00636")
@dataclass(frozen=True)
class Spectral:
    """Spectral signatures; finds poison that is a minority of its class and lies off the class's center.

    Args:
        rank: How many singular directions of a class count.
    """

    rank: int = 1

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    def detect(self, scan: Scan) -> SuspectReport:
        return report(scan, class_spectral_scores(scan.features, scan.labels, rank=self.rank), self)
