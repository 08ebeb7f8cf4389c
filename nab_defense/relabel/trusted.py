"""Trusted set: a linear classifier on a few verified samples labels the suspects [NAB, arXiv:2307.15539, "VD"]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from ..scan import Scan
from .base import Relabeled, merge, relabelers

__all__ = ["Trusted", "fit_linear"]

STRENGTHS = (0.0001, 0.001, 0.01, 0.1, 1.0)  # values of C, inverse L2 penalty, on standardized features
FOLDS = 3


def fit_linear(features: NDArray[np.float32], labels: NDArray[np.int64]) -> Pipeline:
    """Multinomial logistic regression on standardized features.

    C is chosen by the likelihood in 3-fold cross-validation, so that probabilities mean something; 0.01 where a class
    has fewer than 3 samples.

    Args:
        features: (M, D).
        labels: (M,), two classes or more.
    """
    model = Pipeline([("scale", StandardScaler()), ("linear", LogisticRegression(C=0.01, max_iter=1000))])
    if np.unique(labels, return_counts=True)[1].min() >= FOLDS:
        model = GridSearchCV(model, {"linear__C": STRENGTHS}, scoring="neg_log_loss", cv=FOLDS)
    return model.fit(features, labels)


@relabelers.register("trusted", source="arXiv:2307.15539")
@dataclass(frozen=True, eq=False)
class Trusted:
    """Labels by verified samples, which the caller has scanned with the same encoder as the data.

    The paper trains a network on them from scratch; a linear classifier on an encoder's features needs far fewer.

    Args:
        features: (M, D), of the verified samples.
        labels: (M,), their labels, known to be right.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.labels.shape != (len(self.features),):
            raise ValueError(
                f"trusted features and labels must be (M, D) and (M,), got {self.features.shape} and {self.labels.shape}"
            )

    def relabel(self, scan: Scan, suspect: NDArray[np.bool_]) -> Relabeled:
        """See `Relabeler.relabel`.

        Raises:
            ValueError: A class of the scan has no trusted sample, or the features come from another encoder.
        """
        width, expected = self.features.shape[1], scan.features.shape[1]
        if width != expected:
            raise ValueError(f"trusted features have width {width}, the scan's {expected}: use the same encoder for both")
        classes = np.unique(scan.labels)
        lacking = np.setdiff1d(classes, self.labels)
        if len(lacking):
            raise ValueError(
                f"{len(lacking)} of {len(classes)} classes have no trusted sample: {', '.join(map(str, lacking[:10]))}"
                f"{', ...' if len(lacking) > 10 else ''}; add at least one of each"
            )
        if not suspect.any():
            return merge(scan, suspect, np.zeros(0, np.int64), np.zeros(0, np.float32))
        model = fit_linear(self.features, self.labels)
        probability = model.predict_proba(scan.features[suspect])
        return merge(scan, suspect, model.classes_[probability.argmax(axis=1)], probability.max(axis=1))
