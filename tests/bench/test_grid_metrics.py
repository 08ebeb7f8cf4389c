"""DER and TPR at a fixed FPR against hand-made numbers."""

from __future__ import annotations

import numpy as np
import pytest

from nab_defense.bench.metrics import defense_effectiveness, hits_at


def test_der() -> None:
    assert defense_effectiveness((1.0, 0.9), (0.0, 0.9)) == 1
    assert defense_effectiveness((1.0, 0.9), (1.0, 0.9)) == 0.5
    assert defense_effectiveness((0.9, 0.9), (1.0, 0.95)) == 0.5  # neither more ASR nor more ACC counts
    assert defense_effectiveness((0.8, 0.9), (0.1, 0.7)) == pytest.approx((0.7 - 0.2 + 1) / 2)


def test_hits_at_false_alarms() -> None:
    poisoned = np.arange(120) >= 100
    clean = np.arange(100.0)  # 0..99
    scores = np.concatenate([clean, np.full(10, 98.5), np.full(10, 1000.0)])
    assert hits_at(scores, poisoned, false_alarms=0.001) == 0.5  # above all clean ones
    assert hits_at(scores, poisoned, false_alarms=0.01) == 1.0  # one of a hundred may be above
    assert hits_at(np.zeros(120), poisoned, false_alarms=0.01) == 0  # ties find nothing
    assert hits_at(scores, np.zeros(120, bool), false_alarms=0.01) is None
