"""DER, TPR at a fixed FPR and intervals against hand-made and published numbers."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from nab_defense.bench.metrics import area, best_effectiveness, defense_effectiveness, difference, hits_at, paired, wilson


def test_der() -> None:
    assert defense_effectiveness((1.0, 0.9), (0.0, 0.9)) == 1
    assert defense_effectiveness((1.0, 0.9), (1.0, 0.9)) == 0.5
    assert defense_effectiveness((0.9, 0.9), (1.0, 0.95)) == 0.5  # neither more ASR nor more ACC counts
    assert defense_effectiveness((0.8, 0.9), (0.1, 0.7)) == pytest.approx((0.7 - 0.2 + 1) / 2)
    assert best_effectiveness(0.8) == 0.9


def test_difference_of_rates() -> None:
    # Newcombe 1998, table II, method 10: 56/70 - 48/80 and 5/56 - 0/29.
    assert difference(wilson(56, 70), wilson(48, 80)) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    assert difference(wilson(5, 56), wilson(0, 29)) == pytest.approx((0.0893, -0.0381, 0.1926), abs=1e-4)


def test_difference_of_two_answers_to_the_same_questions() -> None:
    def answers(both: int, one: int, other: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
        counts = [both, one, other, neither]
        return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)

    # Newcombe 1998, paired data, method 10: 36 yes and yes, 12 yes and no, 2 no and yes, nobody no and no.
    assert paired(*answers(36, 12, 2, 0)) == pytest.approx((0.2, 0.0569, 0.3404), abs=1e-4)
    value, low, high = paired(*answers(1200, 190, 200, 410))
    _, wide_low, wide_high = difference(wilson(1390, 2000), wilson(1400, 2000))
    assert value == pytest.approx(-0.005) and wide_low < low < value < high < wide_high
    assert paired(*answers(30, 0, 0, 0)) == pytest.approx((0, -0.114, 0.114), abs=2e-3)  # all alike, of few
    first, second = answers(40, 3, 9, 8)
    assert paired(second, first) == pytest.approx([-end for end in (paired(first, second)[i] for i in (0, 2, 1))])
    rng, held = np.random.default_rng(0), []  # how often the interval holds the truth, .1
    for _ in range(400):
        hard = rng.random(300)
        _, low, high = paired(hard + 0.05 * rng.normal(size=300) < 0.7, hard + 0.05 * rng.normal(size=300) < 0.6)
        held.append(low <= 0.1 <= high)
    assert 0.93 < np.mean(held) < 0.99


def test_area_and_its_interval() -> None:
    poisoned, rng = np.arange(400) >= 300, np.random.default_rng(0)
    for found in (area(poisoned.astype(float), poisoned), area(-poisoned.astype(float), poisoned)):
        assert found is not None and found.value in (0, 1) and found.n == 100
        assert found.low <= found.value <= found.high and 0.005 < found.high - found.low < 0.03
    few = area(poisoned[:303].astype(float), poisoned[:303])
    assert few is not None and 0.5 < few.low < 0.9 and few.high == 1  # three samples tell little
    scores = rng.normal(size=400) + poisoned
    found = area(scores, poisoned)
    assert found is not None and 0.7 < found.value < 0.82 and found.low < found.value < found.high
    # The width against the spread of the area when both groups are drawn anew.
    drawn = [roc_auc_score(poisoned, rng.normal(size=400) + poisoned) for _ in range(400)]
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(np.std(drawn), rel=0.2)
    assert area(scores, ~poisoned & poisoned) is None


def test_hits_at_false_alarms() -> None:
    poisoned = np.arange(120) >= 100
    clean = np.arange(100.0)  # 0..99
    scores = np.concatenate([clean, np.full(10, 98.5), np.full(10, 1000.0)])
    assert hits_at(scores, poisoned, false_alarms=0.001) == wilson(10, 20)  # above all clean ones
    assert hits_at(scores, poisoned, false_alarms=0.01) == wilson(20, 20)  # one of a hundred may be above
    assert hits_at(np.zeros(120), poisoned, false_alarms=0.01) == wilson(0, 20)  # ties find nothing
    assert hits_at(scores, np.zeros(120, bool), false_alarms=0.01) is None
