from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from nab_defense.mixture import split_in_two
from nab_defense.parts import MAYBE, joined, same_parts, smaller_halves, with_more_like_it
from nab_defense.principal import project
from nab_defense.scan import Scan
from tests.test_select import CLASSES, sample


def test_the_same_is_found_in_classes_where_it_does_not_stand_apart_by_itself() -> None:
    scan, poisoned = sample(targets=range(CLASSES), rate=0.05, shift=12.0)
    features = scan.features.copy()
    features[poisoned, -CLASSES:] = features[poisoned, -CLASSES:].max(axis=1, keepdims=True)  # one direction in all classes
    seen, some = dataclasses.replace(scan, features=features), poisoned & (scan.labels < 3)
    nobody = np.zeros(len(scan), dtype=bool)
    found = {group.label: likely > 0.5 for group, likely in same_parts(seen, nobody, some)}
    assert sorted(found) == [3, 4]
    for label, part in found.items():
        np.testing.assert_array_equal(part, poisoned & (scan.labels == label))
    assert not same_parts(seen, poisoned & ~some, some)  # the rest of these classes has nothing like it


@pytest.mark.parametrize("content", [True, False])
def test_what_shows_little_of_the_trigger_joins_an_accused_part_where_its_content_is_foreign(content: bool) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES), 400)
    trigger = np.zeros(len(labels))
    trigger[:100], trigger[100:150] = 8.0, 5.0  # class 0: found by itself, shown in part, clean
    features = rng.normal(size=(len(labels), 12)).astype(np.float32)
    features[:, 0] += trigger
    names = np.where((trigger > 0) & content, rng.integers(1, CLASSES, len(labels)), labels)
    names[150:170] = 1  # clean, and hard to tell, as some of the others are
    names[400::20] = (labels[400::20] + 1) % CLASSES
    logits = (3 * np.eye(CLASSES)[names] + rng.normal(size=(len(labels), CLASSES))).astype(np.float32)
    logits[np.arange(len(labels)), names] = logits.max(axis=1) + 0.1
    scan = Scan(labels, np.zeros(len(labels), np.float32), np.eye(CLASSES, dtype=np.float32)[labels], features)
    part = (np.arange(len(labels)) < 100).astype(np.float64)
    now = joined(scan, labels == 0, part, logits, labels > 0) > 0.5
    assert now[:100].all() and not now[400:].any() and now[150:400].sum() <= 10
    assert now[100:150].mean() > 0.8 if content else not now[100:150].any()
    assert part.sum() == 100  # not written to


def test_what_is_harder_to_name_than_ordinary_samples_joins_an_accused_part() -> None:
    """Ten of class 0 that a probe does not tell, since their trigger does not show."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES), 400)
    features = rng.normal(size=(len(labels), 12)).astype(np.float32)
    features[:100, 0] += 8.0
    sure = rng.uniform(3, 6, len(labels))
    sure[100:110], sure[110:120] = 0.5, 3.5  # still named 0, but hardly; and as many of the others are
    logits = (sure[:, None] * np.eye(CLASSES)[labels]).astype(np.float32)
    scan = Scan(labels, np.zeros(len(labels), np.float32), np.eye(CLASSES, dtype=np.float32)[labels], features)
    part, nobody = (np.arange(len(labels)) < 100).astype(np.float64), np.zeros(len(labels), bool)
    now = joined(scan, labels == 0, part, logits, labels > 0)
    assert (now[100:110] > 0.9).all() and not (now[110:120] > 0.5).any() and (now[120:400] > 0.5).mean() < 0.05
    assert np.array_equal(now[400:], part[400:]) and np.array_equal(joined(scan, labels == 0, part, logits, nobody), part)


def test_what_an_earlier_look_missed_of_a_part_may_belong_to_it() -> None:
    scan, poisoned = sample(targets=[0], rate=0.1, shift=12.0)
    members, part = scan.labels == 0, poisoned.copy()
    part[np.flatnonzero(poisoned)[::4]] = False  # a quarter of the poison was missed
    likely, missed = with_more_like_it(scan, members, part), poisoned & ~part
    assert (likely[part] == 1).all() and (likely[missed] == MAYBE).mean() > 0.9
    assert (likely[members & ~poisoned] < 0.02).mean() > 0.95 and not likely[~members].any()


@pytest.mark.parametrize(("rest", "widened"), [(60, True), (15, False)])
def test_a_part_is_not_widened_where_too_little_of_its_class_would_be_left(rest: int, widened: bool) -> None:
    scan, poisoned = sample(targets=[0], rate=0.1, shift=12.0)
    clean = np.flatnonzero((scan.labels == 0) & ~poisoned)
    part = poisoned.copy()
    part[np.flatnonzero(poisoned)[::4]] = False
    members = poisoned | np.isin(np.arange(len(scan)), clean[:rest])
    assert (with_more_like_it(scan, members, part)[poisoned & ~part] > 0).any() == widened


def test_a_part_that_does_not_stand_apart_and_one_of_a_few_samples_stay_as_they_were() -> None:
    scan, poisoned = sample(targets=[0], rate=0.1, shift=12.0)
    members, clean = scan.labels == 0, np.flatnonzero((scan.labels == 0) & ~poisoned)
    for count in (40, 5):
        part = np.isin(np.arange(len(scan)), clean[:count])
        np.testing.assert_array_equal(with_more_like_it(scan, members & ~poisoned, part), part)
    few = np.isin(np.arange(len(scan)), np.flatnonzero(poisoned)[:5])
    np.testing.assert_array_equal(with_more_like_it(scan, members, few), few)


FEW_IN_TWO, FEW_IN_THREE = [4.5, 3.5, 0.0], [4.0, 2.4, 2.4]  # of the others 1.8 to 2.9 deviations away


@pytest.mark.parametrize(
    ("seed", "few", "away"),
    [*((seed, few, FEW_IN_TWO) for seed in range(5) for few in (120, 0)), (3, 120, FEW_IN_THREE), (1, 120, FEW_IN_THREE)],
)
@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_few_that_lie_on_the_slope_of_their_class_in_each_direction_stand_apart_in_several(
    seed: int, few: int, away: list[float]
) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(1200, 12)) * np.r_[2.0, 1.3, 1.2, np.full(9, 0.8)]
    features[:few, :3] = features[:few, :3] * 0.4 + away
    labels = np.zeros(1200, dtype=np.int64)
    for scale in (1.0, 0.0):  # and equal features show nothing
        scan = Scan(labels, np.zeros(1200, np.float32), np.ones((1200, 1), np.float32), (scale * features).astype(np.float32))
        assert split_in_two(project(scan.features, np.arange(1200), 1)[:, 0])[2] < 0.1
        found = smaller_halves(scan, np.zeros(1200, dtype=bool))
        assert bool(found) == bool(few and scale)
        for group, likely in found:
            assert group.valley > 0.5 and 0.95 * few < group.size < 1.15 * few and (likely[:few] > 0.5).mean() > 0.95
