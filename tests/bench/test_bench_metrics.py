"""Intervals against known values; detection and relabeling against counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from nab_defense.bench.metrics import detection, relabel_accuracy, share, wilson
from nab_defense.types import NABPlan


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (0, 100, 0.0, 0.0370),
        (100, 100, 0.9630, 1.0),
        (50, 100, 0.4038, 0.5962),
        (1, 10, 0.0179, 0.4042),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson_against_known_values(hits: int, n: int, low: float, high: float) -> None:
    rate = wilson(hits, n)
    assert (rate.value, rate.n) == (hits / n, n)
    np.testing.assert_allclose([rate.low, rate.high], [low, high], atol=6e-5)


def test_wilson_solves_its_equation_and_mirrors() -> None:
    for hits, n in ((3, 40), (17, 1000), (999, 1000)):
        rate, mirror = wilson(hits, n), wilson(n - hits, n)
        for end in (rate.low, rate.high):  # the ends are where the score statistic is z
            np.testing.assert_allclose((rate.value - end) ** 2, 1.96**2 * end * (1 - end) / n, rtol=1e-6)
        np.testing.assert_allclose([rate.low, rate.high], [1 - mirror.high, 1 - mirror.low])
        assert rate.low < rate.value < rate.high


@pytest.mark.parametrize("n", [1, 3, 7, 10_000])
def test_wilson_stays_inside_and_holds_its_value(n: int) -> None:
    for hits in (0, n):
        rate = wilson(hits, n)
        assert 0 <= rate.low <= rate.value <= rate.high <= 1


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(hits: int, n: int) -> None:
    with pytest.raises(ValueError, match=r"at least one sample|hits must be in 0..5"):
        wilson(hits, n)


def test_share() -> None:
    assert share(np.array([True, False, False, True])) == wilson(2, 4)


def test_detection_counts() -> None:
    poisoned = np.array([1, 1, 1, 1, 0, 0, 0, 0], dtype=bool)
    suspect = np.array([1, 1, 1, 0, 1, 0, 0, 0], dtype=bool)
    scores = np.array([9, 8, 7, 1, 6, 5, 4, 0], dtype=np.float32)  # 3 of 4 above all clean; the fourth beats one of four
    assert detection(suspect, scores, poisoned) == {"selected": 4, "precision": 0.75, "recall": 0.75, "auroc": 13 / 16}
    assert detection(suspect, -scores, poisoned)["auroc"] == pytest.approx(3 / 16)


def test_detection_where_rates_are_undefined() -> None:
    none, some = np.zeros(4, dtype=bool), np.array([1, 0, 0, 0], dtype=bool)
    scores = np.arange(4.0)
    assert detection(none, scores, some) == {"selected": 0, "precision": None, "recall": 0.0, "auroc": 0.0}
    assert detection(some, scores, none) == {"selected": 1, "precision": 0.0, "recall": None, "auroc": None}
    assert detection(some, scores, ~none)["auroc"] is None
    assert detection(some, None, some) == {"selected": 1, "precision": 1.0, "recall": 1.0, "auroc": None}


def test_relabel_accuracy_counts_what_is_trained_on_under_another_label() -> None:
    labels = np.array([0, 0, 0, 0, 0, 0])
    new = np.array([1, 2, 3, 0, 0, 0])
    suspect = np.array([1, 1, 1, 1, 0, 0], dtype=bool)
    keep = np.array([1, 1, 0, 1, 1, 1], dtype=bool)
    plan = NABPlan(labels, new, suspect, keep, np.array([0, 0, 0, 0, 1, 0], dtype=bool))
    assert relabel_accuracy(plan, np.array([1, 1, 3, 0, 0, 4])) == wilson(1, 2)
    assert relabel_accuracy(NABPlan.empty(labels), labels) is None
