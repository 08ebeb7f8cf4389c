from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nab_defense import io
from nab_defense.bench.poison import choose_poison
from nab_defense.plan import (
    MAX_DOUBT,
    PLAN_ARRAYS,
    clean_label_groups,
    load_finding,
    load_plan,
    make_plan,
    paper_plan,
    relabelled,
)
from nab_defense.scan import Scan
from nab_defense.types import NABPlan

N = 1000
LABELS = np.arange(N) % 4
SCAN = Scan(LABELS, np.zeros(N, np.float32), np.zeros((N, 4), np.float32), np.zeros((N, 2), np.float32), "f" * 64)
SUSPECT = np.arange(N) < 100  # 25 of each class


def plan(proposed: Any = None, suspect: Any = SUSPECT, **changes: Any) -> NABPlan:
    knobs: dict[str, Any] = {
        "confidence": np.ones(N, np.float32),
        "doubt": suspect.astype(np.float32),
        "min_confidence": 0.5,
        "cover_fraction": 0.1,
        "seed": 0,
        **changes,
    }
    proposed = np.where(suspect, (LABELS + 1) % 4, LABELS) if proposed is None else proposed
    return make_plan(SCAN, suspect, proposed, knobs.pop("confidence"), **knobs)


def test_the_papers_rule_stamps_altered_suspects_and_nothing_else() -> None:
    proposed = np.where(np.arange(N) < 60, (LABELS + 1) % 4, LABELS)
    made = paper_plan(SCAN, SUSPECT, proposed)
    np.testing.assert_array_equal(made.stamped, np.arange(N) < 60)
    assert made.keep.all() and not made.cover.any() and made.fingerprint == "f" * 64
    np.testing.assert_array_equal(made.new_labels, proposed)
    np.testing.assert_array_equal(made.labels, LABELS)


def test_sure_suspects_are_relabelled_and_stamped_and_as_many_covers_drawn_as_asked() -> None:
    made = plan()
    assert made.keep.all() and made.fingerprint == "f" * 64
    np.testing.assert_array_equal(made.new_labels, np.where(SUSPECT, (LABELS + 1) % 4, LABELS))
    assert made.cover.sum() == 100 and not (made.cover & SUSPECT).any()
    np.testing.assert_array_equal(made.stamped, SUSPECT | made.cover)


def test_a_suspect_without_confidence_or_without_another_label_is_dropped() -> None:
    confidence = np.where(np.arange(N) % 5 == 0, 0.49, 0.5).astype(np.float32)
    agrees = np.arange(N) % 10 == 1
    made = plan(np.where(SUSPECT & ~agrees, (LABELS + 1) % 4, LABELS), confidence=confidence)
    np.testing.assert_array_equal(~made.keep, SUSPECT & ((confidence < 0.5) | agrees))
    assert not (made.stamped & made.keep & ~made.altered & ~made.cover).any()


def test_confidence_of_others_does_not_matter() -> None:
    made = plan(confidence=SUSPECT.astype(np.float32))
    assert made.keep.all()


def test_the_confidence_gate_is_monotone() -> None:
    confidence = np.random.default_rng(0).random(N).astype(np.float32)
    dropped = [~plan(confidence=confidence, min_confidence=gate).keep for gate in (0.0, 0.3, 0.7, 1.0)]
    assert [int(d.sum()) for d in dropped] == [int((SUSPECT & (confidence < gate)).sum()) for gate in (0.0, 0.3, 0.7, 1.0)]
    assert all((first <= second).all() for first, second in pairwise(dropped))


def test_a_clean_label_group_is_dropped_whole() -> None:
    # Class 2: 15 of 25 suspects keep their label; class 3: 12 of 25 do, so its other 13 are stamped.
    rank = np.arange(N) // 4
    keeps = SUSPECT & (((LABELS == 2) & (rank < 15)) | ((LABELS == 3) & (rank < 12)))
    made = plan(np.where(SUSPECT & ~keeps, (LABELS + 1) % 4, LABELS))
    np.testing.assert_array_equal(~made.keep, (SUSPECT & (LABELS == 2)) | (keeps & (LABELS == 3)))
    (group,) = clean_label_groups(LABELS, made.new_labels, SUSPECT)
    assert np.array_equal(group, SUSPECT & (LABELS == 2))


def test_half_is_not_most() -> None:
    assert clean_label_groups(np.zeros(4, np.int64), np.array([0, 0, 1, 1]), np.ones(4, bool)) == []


def test_covers_are_drawn_among_the_undoubted_only() -> None:
    doubt = np.where(SUSPECT, 1.0, np.where(np.arange(N) < 900, 2 * MAX_DOUBT, MAX_DOUBT)).astype(np.float32)
    assert (np.flatnonzero(plan(doubt=doubt, cover_fraction=0.05).cover) >= 900).all()
    assert plan(doubt=doubt, cover_fraction=0.5).cover.sum() == 100  # there are not more
    assert plan(cover_fraction=0.0).cover.sum() == 0


@pytest.mark.parametrize("why", ["nobody is suspect", "nobody is sure", "all keep their label"])
def test_no_covers_where_nothing_is_stamped(why: str) -> None:
    suspect = SUSPECT if why != "nobody is suspect" else np.zeros(N, bool)
    made = plan(
        suspect=suspect,
        proposed=LABELS if why == "all keep their label" else None,
        confidence=np.full(N, 0.1 if why == "nobody is sure" else 1, np.float32),
    )
    assert not made.cover.any() and not (made.stamped & made.keep).any()
    np.testing.assert_array_equal(~made.keep, suspect)


def test_the_seed_decides_the_covers() -> None:
    first, again, other = plan(seed=1), plan(seed=1), plan(seed=2)
    np.testing.assert_array_equal(first.cover, again.cover)
    assert (first.cover != other.cover).any() and first.cover.sum() == other.cover.sum()


def test_relabelled_are_the_altered_suspects_outside_clean_label_groups() -> None:
    proposed = np.where(SUSPECT, (LABELS + 1) % 4, LABELS)
    kept = SUSPECT & (LABELS == 2) & (np.arange(N) >= 40)  # most suspects of class 2 keep their label, ten of them do not
    proposed[kept] = 2
    made = paper_plan(SCAN, SUSPECT, proposed)
    assert (relabelled(made) == SUSPECT & (LABELS != 2)).all() and (made.altered & ~relabelled(made)).sum() == 10
    assert not relabelled(NABPlan.empty(LABELS)).any()


def test_covers_are_not_what_an_attacker_with_the_same_seed_poisoned() -> None:
    few, shares = np.arange(N) < 5, []
    for seed in range(20):
        poisoned = choose_poison(
            LABELS, rate=0.1, target=None, mode="all_to_all", clean_label=False, num_classes=4, rng=np.random.default_rng(seed)
        )
        shares.append(plan(suspect=few, seed=seed).cover[poisoned].mean())
    assert np.mean(shares) < 0.13  # a tenth of all are covers


def test_a_plan_of_another_version_is_a_plan_still(tmp_path: Path) -> None:
    io.save_arrays(tmp_path / "plan.npz", {name: getattr(plan(), name) for name in PLAN_ARRAYS}, {"fingerprint": "f"})
    assert load_plan(tmp_path / "plan.npz").fingerprint == "f"
    with pytest.raises(ValueError, match="another version of this package"):
        load_finding(tmp_path / "plan.npz")
