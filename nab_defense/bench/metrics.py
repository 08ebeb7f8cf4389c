"""Rates with their uncertainty, and how well detection and relabeling did against the truth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from sklearn.metrics import roc_auc_score

from ..types import NABPlan, Rate

__all__ = [
    "area", "best_effectiveness", "defense_effectiveness", "detection", "detection_rates", "difference", "hits_at",
    "paired", "relabel_accuracy", "share", "wilson",
]  # fmt: skip


TINY = 1e-9  # of an AUROC: less than one pair of samples


def wilson(hits: int, n: int, z: float = 1.96) -> Rate:
    """hits / n with Wilson's score interval [Wilson 1927], which stays sensible at 0 and at 1, where backdoor rates live.

    Args:
        hits: 0 <= hits <= n.
        n: Sample size, at least 1.
        z: Quantile of the normal distribution; 1.96 gives 95 %.

    Raises:
        ValueError: n is 0, or hits lies outside 0..n.
    """
    if n < 1:
        raise ValueError(f"a rate needs at least one sample, got n = {n}")
    if not 0 <= hits <= n:
        raise ValueError(f"hits must be in 0..{n}, got {hits}")
    value = hits / n
    center = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    # The interval always holds the value; rounding errors would push it a hair out at 0 and at 1.
    return Rate(value, n, low=max(0.0, min(center - half, value)), high=min(1.0, max(center + half, value)))


def share(mask: NDArray[np.bool_]) -> Rate:
    """The share of True in (N,) bool, N >= 1."""
    return wilson(int(np.count_nonzero(mask)), len(mask))


def difference(first: Rate, second: Rate) -> tuple[float, float, float]:
    """first - second with its 95 % interval [Newcombe 1998, method 10]: value, low, high, in [-1, 1].

    It takes the two for independent; of two networks on the same images see paired."""
    value = first.value - second.value
    down = math.hypot(first.value - first.low, second.high - second.value)
    up = math.hypot(first.high - first.value, second.value - second.low)
    return value, max(-1.0, value - down), min(1.0, value + up)


def paired(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Share of True in the first less that in the second, of the same samples, with its 95 % interval [Newcombe 1998, paired
    data, method 10]: value, low, high, in [-1, 1].

    Args: first, second: (N,) bool each, N >= 1."""
    one, other, n = share(first), share(second), len(first)
    both, only, neither = (int(np.count_nonzero(mask)) for mask in (first & second, first & ~second, ~(first | second)))
    alike = float(both * neither - only * (n - both - only - neither))
    alike = max(alike - n / 2, 0.0) if alike > 0 else alike  # corrected for continuity
    sums = [rate.value * (1 - rate.value) * n * n for rate in (one, other)]
    phi = alike / math.sqrt(math.prod(sums)) if all(sums) else 0.0

    def end(here: float, there: float) -> float:
        return math.sqrt(max(0.0, here**2 - 2 * phi * here * there + there**2))

    value = one.value - other.value
    down = end(one.value - one.low, other.high - other.value)
    up = end(one.high - one.value, other.value - other.low)
    return value, max(-1.0, value - down), min(1.0, value + up)


def area(scores: NDArray[Any], poisoned: NDArray[np.bool_], z: float = 1.96) -> Rate | None:
    """AUROC of a ranking with its interval [Newcombe 2006, part 2, method 5], which has a width at 0 and at 1, too; n is the
    number of poisoned samples. Where half of the poison is found and the rest ranked as clean it covers less: .85 of 300 draws.

    Args:
        scores: (N,), higher = more suspicious.
        poisoned: (N,) bool, the truth.
        z: As in wilson.

    Returns:
        None where nothing or everything is poisoned."""
    many, few = int(np.count_nonzero(~poisoned)), int(np.count_nonzero(poisoned))
    if not many or not few:
        return None
    value = float(roc_auc_score(poisoned, scores))

    def beyond(true: float) -> float:
        """Above 0 where the value lies further from this true one than z deviations."""
        more = (few + many) / 2 - 1
        variance = true * (1 - true) * (1 + more * ((1 - true) / (2 - true) + true / (1 + true))) / (few * many)
        return (value - true) ** 2 - z * z * variance

    low = brentq(beyond, 0, value - TINY) if value > TINY else 0.0
    high = brentq(beyond, value + TINY, 1) if value < 1 - TINY else 1.0
    return Rate(value, few, low=low, high=high)


def detection(
    suspect: NDArray[np.bool_], scores: NDArray[Any] | None, poisoned: NDArray[np.bool_]
) -> dict[str, int | float | None]:
    """How well the suspects match the poison.

    Args:
        suspect: (N,) bool, what the defence selected.
        scores: (N,), higher = more suspicious; None where there are none.
        poisoned: (N,) bool, the truth.

    Returns:
        selected (a count), precision, recall and auroc in [0, 1]; None where undefined: nothing selected, nothing
        poisoned, or no scores.
    """
    rates = detection_rates(suspect, scores, poisoned)
    return {
        "selected": int(np.count_nonzero(suspect)),
        **{name: None if rate is None else rate.value for name, rate in rates.items()},
    }


def detection_rates(
    suspect: NDArray[np.bool_], scores: NDArray[Any] | None, poisoned: NDArray[np.bool_]
) -> dict[str, Rate | None]:
    """precision, recall and auroc as in detection, each with its n and interval."""
    return {
        "precision": share(poisoned[suspect]) if suspect.any() else None,
        "recall": share(suspect[poisoned]) if poisoned.any() else None,
        "auroc": None if scores is None else area(scores, poisoned),
    }


def hits_at(scores: NDArray[Any], poisoned: NDArray[np.bool_], *, false_alarms: float) -> Rate | None:
    """Share of the poison that ranks above all but this share of the clean samples (TPR at a fixed FPR).

    Ties count against the detector: a sample is found where it scores higher than the threshold.

    Args:
        scores: (N,), higher = more suspicious.
        poisoned: (N,) bool, the truth.
        false_alarms: In [0, 1).

    Returns:
        n is the number of poisoned samples; None where nothing or everything is poisoned."""
    clean = np.sort(scores[~poisoned])[::-1]
    if not len(clean) or not poisoned.any():
        return None
    threshold = clean[int(false_alarms * len(clean))]
    return share(scores[poisoned] > threshold)


def defense_effectiveness(before: tuple[float, float], after: tuple[float, float]) -> float:
    """DER [FT-SAM, Zhu et al. 2023, arXiv:2304.11823, eq. 7]: 1 is an attack undone at no cost, .5 is nothing done.

    Args: before, after: ASR and ACC of the undefended network and of the other, in [0, 1].

    Returns: (max(0, fall of ASR) - max(0, fall of ACC) + 1) / 2, in [0, 1]."""
    return (max(0.0, before[0] - after[0]) - max(0.0, before[1] - after[1]) + 1) / 2


def best_effectiveness(before: float) -> float:
    """DER of a defence that undoes the attack at no cost, the most that can be had.

    Args: before: ASR of the undefended network, in [0, 1]."""
    return defense_effectiveness((before, 0.0), (0.0, 0.0))


def relabel_accuracy(plan: NABPlan, true_labels: NDArray[np.int64]) -> Rate | None:
    """Share of the relabelled samples that training sees whose new label is the true one, (N,) int64 given; None without any."""
    correct = (plan.new_labels == true_labels)[plan.altered & plan.keep]
    return share(correct) if len(correct) else None
