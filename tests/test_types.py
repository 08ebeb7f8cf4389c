from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from nab_defense.types import NABPlan, SuspectReport


def plan(**changes: object) -> NABPlan:
    """Five samples: untouched, relabeled suspect, suspect that keeps its label, cover, dropped suspect."""
    fields: dict[str, object] = {
        "labels": [0, 1, 2, 0, 1],
        "new_labels": [0, 2, 2, 0, 1],
        "suspect": [False, True, True, False, True],
        "keep": [True, True, True, True, False],
        "cover": [False, False, False, True, False],
        "fingerprint": "a" * 40,
    }
    return NABPlan(**{**fields, **changes})  # type: ignore[arg-type]


def test_stamped_is_a_suspect_whose_label_changes_or_a_cover() -> None:
    example = plan()
    assert len(example) == 5
    assert example.altered.tolist() == [False, True, False, False, False]
    assert example.stamped.tolist() == [False, True, False, True, False]
    assert example.changed.tolist() == [False, True, False, True, True]


def test_stamped_over_every_combination() -> None:
    bits = np.array(list(np.ndindex(2, 2, 2)), dtype=bool)  # suspect, altered, cover
    # Only a suspect may change its label, and only others may be covers.
    suspect, altered, cover = bits[(bits[:, 0] | ~bits[:, 1]) & ~(bits[:, 0] & bits[:, 2])].T
    zeros = np.zeros(len(suspect), dtype=np.int64)
    example = NABPlan(zeros, altered.astype(np.int64), suspect, ~cover, cover)
    np.testing.assert_array_equal(example.stamped, (suspect & altered) | cover)


def test_an_empty_plan_changes_nothing() -> None:
    example = NABPlan.empty([2, 0, 1], "f")
    assert example.new_labels.tolist() == [2, 0, 1] and example.keep.all() and example.fingerprint == "f"
    assert not (example.suspect | example.cover | example.stamped | example.changed).any()


def test_a_label_changes_on_suspects_only() -> None:
    with pytest.raises(ValueError, match="1 samples change their label without being suspects"):
        plan(new_labels=[1, 2, 2, 0, 1])


def test_a_cover_is_no_suspect() -> None:
    with pytest.raises(ValueError, match="1 samples are both suspects and covers"):
        plan(cover=[False, True, False, True, False])


@pytest.mark.parametrize("name", ["labels", "new_labels", "suspect", "keep", "cover"])
def test_plan_arrays_are_checked_copied_and_read_only(name: str) -> None:
    array = np.array(getattr(plan(), name))
    example = plan(**{name: array})
    held = getattr(example, name)
    with pytest.raises(ValueError, match="read-only"):
        held[0] = 1
    before = held.tolist()
    array[:] = 1 - array
    assert held.tolist() == before
    with pytest.raises(FrozenInstanceError):
        setattr(example, name, array)
    if name != "labels":
        with pytest.raises(ValueError, match=rf"{name} must have shape \(5,\), got \(4,\)"):
            plan(**{name: array[:4]})
    with pytest.raises(ValueError, match=f"{name} must have shape"):
        plan(**{name: np.zeros((5, 1))})


def test_the_mark_of_a_plan_is_what_training_sees() -> None:
    example = plan()
    assert example.mark("a") == plan(labels=[0, 1, 2, 0, 0], new_labels=[0, 2, 2, 0, 0]).mark("a")  # the last is dropped
    others = [plan(cover=[True] + [False] * 4), plan(keep=[False] + [True] * 4), plan(new_labels=[0, 0, 2, 0, 1])]
    assert len({example.mark("a"), example.mark("b"), *(other.mark("a") for other in others)}) == 5


def test_plan_refuses_other_data() -> None:
    example = plan()
    example.check_matches(5, "a" * 40)
    with pytest.raises(ValueError, match="the plan is for 5 samples, the data set has 6"):
        example.check_matches(6, "a" * 40)
    with pytest.raises(ValueError, match="fingerprint aaaaaaaaaaaa, this data set has bbbbbbbbbbbb"):
        example.check_matches(5, "b" * 40)


def test_select_takes_the_highest_and_the_lower_index_of_a_tie() -> None:
    report = SuspectReport([1, 3, 2, 2, 2, 0, 0, 0, 0, 0], np.zeros(10), "d")
    assert np.flatnonzero(report.select(0.1)).tolist() == [1]
    assert np.flatnonzero(report.select(0.3)).tolist() == [1, 2, 3]
    assert np.flatnonzero(SuspectReport(np.ones(10), np.zeros(10), "d").select(0.4)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_select_refuses_a_fraction_outside_0_1(fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"fraction must be in \(0, 1\), got {fraction}"):
        SuspectReport([1.0], [0], "d").select(fraction)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_report_refuses_scores_that_are_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="d gave 1 scores that are not finite"):
        SuspectReport([0, bad], [0, 1], "d")


def test_report_arrays_are_typed_checked_and_read_only() -> None:
    report = SuspectReport([0.5, 1], [0, 1], "d")
    assert report.scores.dtype == np.float32 and report.labels.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        report.scores[0] = 0
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\), got \(3,\)"):
        SuspectReport([0.5, 1], [0, 1, 2], "d")
    with pytest.raises(ValueError, match=r"scores must have shape \(N,\), got \(1, 2\)"):
        SuspectReport([[0.5, 1]], [0, 1], "d")
