"""What every relabeler shares: the registry, the protocol, and the checks on what goes in and out."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..registry import Registry
from ..scan import Scan

__all__ = ["Relabeled", "Relabeler", "merge", "relabelers", "trusted_rows"]

Relabeled = tuple[NDArray[np.int64], NDArray[np.float32]]


class Relabeler(Protocol):
    """Proposes labels for suspects from `scan.features`, whichever encoder made them.

    A scan by a second encoder serves as well as one by the network under training, if it has the same samples in the
    same order. Only labels and features are read, so that the encoder may have any head or none.
    """

    def relabel(self, scan: Scan, suspect: NDArray[np.bool_]) -> Relabeled:
        """New labels and the confidence in them.

        Args:
            scan: What an encoder made of every sample.
            suspect: (N,) bool, the samples whose labels are in doubt.

        Returns:
            (N,) int64 labels, and (N,) float32 in [0, 1]; samples that are not suspects keep their label, with 1.
        """
        ...


relabelers: Registry[Relabeler] = Registry("relabeler")


def trusted_rows(scan: Scan, suspect: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(N,) bool, the samples to learn from: all that are not suspects.

    Raises:
        ValueError: `suspect` does not fit the scan, or leaves a class without a sample: that class could never be
            proposed, so each of its suspects would get a wrong label.
    """
    _check_suspect(scan, suspect)
    lost = np.setdiff1d(scan.labels[suspect], scan.labels[~suspect])
    if len(lost):
        raise ValueError(
            f"every sample of class {', '.join(map(str, lost))} is a suspect, so nothing shows what that class looks like: "
            "select a smaller fraction, or relabel by a trusted set"
        )
    return ~suspect


def merge(scan: Scan, suspect: NDArray[np.bool_], proposed: NDArray[Any], confidence: NDArray[Any]) -> Relabeled:
    """Put proposals for the suspects among the labels of all samples.

    Args:
        scan: Holds the labels that came with the data.
        suspect: (N,) bool with S true.
        proposed: (S,) integer labels >= 0, in the suspects' order.
        confidence: (S,) in [0, 1].

    Returns:
        What `Relabeler.relabel` returns.

    Raises:
        ValueError: A shape, a label or a confidence is out of range.
    """
    _check_suspect(scan, suspect)
    count = int(suspect.sum())
    for name, array in (("proposed", proposed), ("confidence", confidence)):
        if np.shape(array) != (count,):
            raise ValueError(f"{name} must have shape ({count},), one for each suspect, got {np.shape(array)}")
    if count and np.min(proposed) < 0:
        raise ValueError(f"proposed labels must be >= 0, got {np.min(proposed)}")
    new_labels = np.array(scan.labels, dtype=np.int64)
    new_labels[suspect] = proposed
    certainty = np.ones(len(scan), dtype=np.float32)
    certainty[suspect] = confidence
    if not ((certainty >= 0) & (certainty <= 1)).all():
        raise ValueError("confidence must be in [0, 1] and finite")
    return new_labels, certainty


def _check_suspect(scan: Scan, suspect: NDArray[np.bool_]) -> None:
    if suspect.shape != (len(scan),) or suspect.dtype != np.bool_:
        raise ValueError(f"suspect must be ({len(scan)},) bool, got {suspect.shape} {suspect.dtype}")
