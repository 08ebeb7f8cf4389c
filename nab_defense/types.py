"""The values that pass between stages: frozen dataclasses of numpy arrays."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["EvalResult", "NABPlan", "Rate", "SuspectReport"]

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


def _frozen(value: Any, dtype: Any, name: str, length: int | None = None) -> NDArray[Any]:
    array = np.array(value, dtype=dtype)
    if array.ndim != 1 or (length is not None and len(array) != length):
        raise ValueError(f"{name} must have shape ({'N' if length is None else length},), got {array.shape}")
    array.setflags(write=False)
    return array


@dataclass(frozen=True, eq=False)
class SuspectReport:
    """What a detector thinks of every sample.

    Args:
        scores: (N,) float32, HIGHER = more suspicious; finite.
        labels: (N,) int64, the labels that came with the data.
        detector: Registered name of the detector.
        params: Its settings, JSON-able.
        fingerprint: Fingerprint of the scanned source.
    """

    scores: NDArray[np.float32]
    labels: IntArray
    detector: str
    params: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", _frozen(self.scores, np.float32, "scores"))
        object.__setattr__(self, "labels", _frozen(self.labels, np.int64, "labels", len(self.scores)))
        if not np.isfinite(self.scores).all():
            raise ValueError(f"{self.detector} gave {int((~np.isfinite(self.scores)).sum())} scores that are not finite")

    def select(self, fraction: float) -> BoolArray:
        """The most suspicious `fraction` of all samples, (N,) bool; ties go to the lower index."""
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must be in (0, 1), got {fraction}")
        chosen = np.zeros(len(self.scores), dtype=bool)
        chosen[np.argsort(-self.scores, kind="stable")[: int(fraction * len(chosen))]] = True
        return chosen


@dataclass(frozen=True, eq=False)
class NABPlan:
    """What training changes, sample by sample [NAB, arXiv:2307.15539, section 4].

    Args:
        labels: (N,) int64, the labels that came with the data.
        new_labels: (N,) int64, the labels to train with.
        suspect: (N,) bool, samples under suspicion.
        keep: (N,) bool, False drops a sample from training.
        cover: (N,) bool, trusted images that are stamped with their own label.
        fingerprint: Fingerprint of the source the plan was made for.

    Raises:
        ValueError: Shapes differ, a label changes on a sample that is not a suspect, or a suspect is a cover.
    """

    labels: IntArray
    new_labels: IntArray
    suspect: BoolArray
    keep: BoolArray
    cover: BoolArray
    fingerprint: str = ""

    def __post_init__(self) -> None:
        size = len(self.labels)
        for name, dtype in (("labels", np.int64), ("new_labels", np.int64)):
            object.__setattr__(self, name, _frozen(getattr(self, name), dtype, name, size))
        for name in ("suspect", "keep", "cover"):
            object.__setattr__(self, name, _frozen(getattr(self, name), bool, name, size))
        stray = self.altered & ~self.suspect
        if stray.any():
            raise ValueError(f"{int(stray.sum())} samples change their label without being suspects")
        both = self.suspect & self.cover
        if both.any():
            raise ValueError(f"{int(both.sum())} samples are both suspects and covers, which are trusted")

    @classmethod
    def empty(cls, labels: Any, fingerprint: str = "") -> NABPlan:
        """A plan that changes nothing."""
        labels = np.asarray(labels, dtype=np.int64)
        no = np.zeros(len(labels), dtype=bool)
        return cls(labels, labels, no, ~no, no, fingerprint)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def altered(self) -> BoolArray:
        """(N,) bool: the label changes."""
        return np.asarray(self.new_labels != self.labels)

    @property
    def stamped(self) -> BoolArray:
        """(N,) bool: the image is stamped; a suspect only where its label changes too."""
        return np.asarray((self.suspect & self.altered) | self.cover)

    @property
    def changed(self) -> BoolArray:
        """(N,) bool: training sees this sample differently, or not at all."""
        return np.asarray(self.stamped | self.altered | ~self.keep)

    def mark(self, images: str) -> str:
        """What training under this plan sees of images with this fingerprint, as a short name."""
        seen = (self.new_labels[self.keep], self.keep, self.stamped)
        return hashlib.sha256(b"".join([images.encode(), *(array.tobytes() for array in seen)])).hexdigest()[:16]

    def check_matches(self, length: int, fingerprint: str) -> None:
        """Refuse a data set that the plan was not made for.

        Raises:
            ValueError: Its length or its fingerprint differs, or it has none.
        """
        if length != len(self):
            raise ValueError(f"the plan is for {len(self)} samples, the data set has {length}: scan this data set again")
        if self.fingerprint and not fingerprint:
            raise ValueError(
                "whether the plan is for this data set cannot be told, as that has no fingerprint, and its order may be another: "
                "wrap open_source(...).view(), or give dataclasses.replace(plan, fingerprint='') where you know that it is"
            )
        if self.fingerprint and fingerprint != self.fingerprint:
            raise ValueError(
                f"the plan is for data with fingerprint {self.fingerprint[:12]}, this data set has "
                f"{fingerprint[:12]}: files or labels changed since the scan, scan again"
            )


@dataclass(frozen=True)
class Rate:
    """A share with its sample size and 95 % Wilson interval, all in [0, 1]."""

    value: float
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class EvalResult:
    """ACC on clean test images; ASR and RA on triggered ones whose true class is not the target (None: no attack); ASR once more
    after retuning on a few of them, on the others (None: there were none to retune on); of several triggers at once, the ASR of
    the one that works best, and of the one that does least (None: there is one)."""

    acc: Rate
    asr: Rate | None = None
    ra: Rate | None = None
    retuned: Rate | None = None
    worst: Rate | None = None
    least: Rate | None = None
