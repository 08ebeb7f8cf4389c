"""Nearest center: a suspect gets the label of the closest class center [NAB, arXiv:2307.15539, pseudo labels "NC"]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax
from sklearn.preprocessing import normalize

from ..principal import BLOCK
from ..scan import Scan
from .base import Relabeled, merge, relabelers, trusted_rows

__all__ = ["NearestCenter", "fit_sharpness", "trimmed_center"]

Matrix = NDArray[np.float32]
MAX_SHARPNESS = 1000.0  # enough for cosines that differ by a hundredth


def trimmed_center(unit: Matrix, *, trim: float) -> Matrix:
    """Direction of the mean of the samples closest to it, so that a few mislabeled ones do not move it.

    Three concentration steps [Rousseeuw & Van Driessen 1999, FAST-MCD]: average, keep the closest, average those.

    Args:
        unit: (N, D), rows of length 1; N >= 1.
        trim: Share of the rows to leave out, the farthest ones, in [0, 1).

    Returns:
        (D,), length 1, or 0 where the rows cancel.
    """
    count = len(unit) - int(trim * len(unit))
    center = normalize(unit.mean(axis=0, keepdims=True))[0]
    for _ in range(3):
        closest = np.argsort(-(unit @ center), kind="stable")[:count]
        center = normalize(unit[closest].mean(axis=0, keepdims=True))[0]
    return np.asarray(center, dtype=np.float32)


def fit_sharpness(similarity: Matrix, position: NDArray[np.intp]) -> float:
    """The b in [0, 1000] under which softmax(b * similarity) makes the given classes most likely.

    Temperature scaling [Guo et al. 2017, arXiv:1706.04599], with b for 1 / T: the likelihood is concave in b. Fitted on
    the samples that made the centers, as there is one parameter and many samples; mislabeled ones among them
    lower b, hence the confidence. Separable classes would ask for an infinite b and leave no doubt about a point halfway
    between two centers; so the targets are smoothed by the rule of succession [Platt 1999], one pseudo-sample a class.

    Args:
        similarity: (N, K), cosine to each center.
        position: (N,), which of the K columns is the sample's own class.
    """
    size, num_classes = similarity.shape
    smoothing = num_classes / (size + num_classes)
    own = similarity[np.arange(size), position]
    target = float(np.mean((1 - smoothing) * own + smoothing * similarity.mean(axis=1)))

    def loss(sharpness: float) -> float:
        return float(np.mean(logsumexp(sharpness * similarity, axis=1))) - sharpness * target

    return float(minimize_scalar(loss, bounds=(0.0, MAX_SHARPNESS), method="bounded").x)


@relabelers.register("nearest_center", source="arXiv:2307.15539")
@dataclass(frozen=True)
class NearestCenter:
    """Nearest class center by cosine similarity; confidence is the calibrated probability of that class.

    The paper describes plain centers and gives no confidence; trimming and calibration are ours. Suspects that were
    missed still count toward the center of the label they carry: trimming bears `trim` of them in a class, not more.

    Args:
        trim: Share of every class to leave out of its center, in [0, 0.5].
    """

    trim: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.trim <= 0.5:
            raise ValueError(f"trim must be in [0, 0.5], got {self.trim}")

    def relabel(self, scan: Scan, suspect: NDArray[np.bool_]) -> Relabeled:
        rows = trusted_rows(scan, suspect)
        classes, position = np.unique(scan.labels[rows], return_inverse=True)
        trusted = np.flatnonzero(rows)
        centers = np.stack(
            [trimmed_center(normalize(scan.features[trusted[position == c]]), trim=self.trim) for c in range(len(classes))]
        )
        parts = range(0, len(scan), BLOCK)
        similarity = np.concatenate([normalize(scan.features[first : first + BLOCK]) @ centers.T for first in parts])
        probability = softmax(fit_sharpness(similarity[rows], position) * similarity[suspect], axis=1)
        return merge(scan, suspect, classes[probability.argmax(axis=1)], probability.max(axis=1))
