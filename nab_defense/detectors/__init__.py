"""Detectors: one method a file; importing this package registers them."""

from . import activation_clustering, knn, lga, spectral  # noqa: F401
from .base import Detector, detectors

__all__ = ["Detector", "detectors"]
