"""The learning rate's course: over updates, with decays where they are told, and the same in a shortened training."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nab_defense.train import TrainConfig, fit
from tests.test_train import CPU, Toy, config, network


def test_cosine_runs_over_updates() -> None:
    history = fit(network(), Toy(), runtime=CPU, train=config(lr=0.2))
    steps = [5 * epoch + 4 for epoch in range(4)]  # the last of each epoch's five updates
    assert [record["lr"] for record in history] == pytest.approx([0.1 * (1 + math.cos(math.pi * t / 20)) for t in steps])
    flat = fit(network(), Toy(), runtime=CPU, train=config(sched="none"))
    assert [record["lr"] for record in flat] == [0.05] * 4
    warm = fit(network(), Toy(batch=40), runtime=CPU, train=config(warmup_epochs=2, warmup_lr=0.01, sched="cosine"))
    assert [record["lr"] for record in warm[:2]] == pytest.approx([0.01, 0.03])


@pytest.mark.parametrize(
    ("changes", "factors"),
    [
        ({"sched": "step", "decay_epochs": 2, "decay_rate": 0.5}, [1, 1, 0.5, 0.5, 0.25]),
        ({"sched": "multistep", "decay_milestones": (4, 1), "decay_rate": 0.2}, [0.2, 0.2, 0.2, 0.04, 0.04]),  # an update early
        ({"sched": "poly", "decay_rate": 1.0}, [1, 0.8, 0.6, 0.4, 0.2]),
    ],
)
def test_decays_come_when_they_are_told(changes: dict[str, Any], factors: list[float]) -> None:
    history = fit(network(), Toy(batch=40), runtime=CPU, train=config(epochs=5, lr=0.05, **changes))
    assert [record["lr"] for record in history] == pytest.approx([0.05 * factor for factor in factors])


@pytest.mark.parametrize(
    "changes", [{"sched": "step", "decay_epochs": 4}, {"sched": "multistep", "decay_milestones": (4, 6)}, {}]
)
def test_a_shortened_schedule_takes_the_same_course(changes: dict[str, Any]) -> None:
    long = TrainConfig(epochs=8, lr=0.05, warmup_epochs=2, warmup_lr=0.01, batch_size=40, decay_rate=0.5, **changes)
    short = long.shortened(4)
    assert short.epochs == 4 and long.shortened(8) is long
    fast = fit(network(), Toy(batch=20), runtime=CPU, train=short)  # two updates an epoch, as many in all
    slow = fit(network(), Toy(batch=40), runtime=CPU, train=long)
    assert [record["lr"] for record in fast] == pytest.approx([record["lr"] for record in slow[1::2]])


def test_short_phases_are_not_lost() -> None:
    short = TrainConfig(epochs=300, warmup_epochs=5, sched="multistep", decay_milestones=(5, 150)).shortened(30)
    assert short.decay_milestones == (1, 15) and short.warmup_epochs == 1
    assert TrainConfig(epochs=44, sched="multistep", decay_milestones=(22,)).shortened(30).decay_milestones == (15,)
