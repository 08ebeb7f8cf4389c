from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits

from nab_defense import select
from nab_defense.check import small_classes
from nab_defense.mixture import split_in_two
from nab_defense.scan import Scan
from nab_defense.select import MIN_LEAD, MIN_SEEDS, Group, Selection, expand, take_fraction
from nab_defense.types import SuspectReport

CLASSES, DIM = 5, 24


def sample(
    *, seed: int = 0, count: int = 2500, targets: Iterable[int] = (), rate: float = 0.0, shift: float = 8.0
) -> tuple[Scan, NDArray[np.bool_]]:
    """What a scan early in training sees: features of `count` images, whose losses follow a direction of ease in them.

    `rate` of all are poison, split over the target classes: `shift` deviations away along a direction of its own, and easy."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    features = rng.normal(size=(count, DIM)) @ np.diag(np.linspace(2, 0.5, DIM)) + 2 * rng.normal(size=(CLASSES, DIM))[labels]
    ease = features[:, 0] + 0.5 * features[:, 1]
    poisoned = np.zeros(count, dtype=bool)
    for target in targets:
        chosen = rng.choice(np.flatnonzero(~poisoned), int(rate * count / len(list(targets))), replace=False)
        features[chosen, -1 - target] += shift
        labels[chosen], poisoned[chosen] = target, True
    losses = np.exp(-0.4 * ease + 0.3 * rng.normal(size=count) - 3 * poisoned)
    logits = np.eye(CLASSES)[labels]  # the network names all of them right
    return Scan(labels, losses.astype(np.float32), logits.astype(np.float32), features.astype(np.float32)), poisoned


def lowest(scan: Scan) -> SuspectReport:
    return SuspectReport(-scan.losses, scan.labels, "lga")


def precision_and_recall(suspect: NDArray[np.bool_], poisoned: NDArray[np.bool_]) -> tuple[float, float]:
    hits = (suspect & poisoned).sum()
    return hits / max(1, suspect.sum()), hits / poisoned.sum()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("center", "spread", "share"), [(6.0, 1.0, 0.3), (8.0, 2.0, 0.1), (10.0, 0.5, 0.05)])
def test_two_humps_are_split_where_they_are(center: float, spread: float, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    higher = rng.random(2000) < share
    values = np.where(higher, center + spread * rng.normal(size=2000), rng.normal(size=2000))
    likely, separation, valley = split_in_two(values)
    assert separation == pytest.approx(center / np.sqrt((1 + spread**2) / 2), rel=0.12)
    assert valley > 0.5
    assert ((likely > 0.5) == higher).mean() > 0.985
    mirrored, same_separation, same_valley = split_in_two(-3 * values + 7)
    assert (same_separation, same_valley) == pytest.approx((separation, valley), rel=0.02)
    np.testing.assert_allclose(mirrored, 1 - likely, atol=0.05)


@pytest.mark.parametrize("seed", range(10))
def test_one_hump_has_no_valley(seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=2000)
    assert split_in_two(values)[2] < 0.25


def test_equal_values_and_skewed_ones_have_no_valley() -> None:
    for value in (0.0, 5.0):
        assert split_in_two(np.full(100, value))[1:] == (0, 0)
    assert split_in_two(np.full(100, 0.3), means=(0.0, 1.0))[1:] == (0, 0)
    assert split_in_two(np.random.default_rng(0).exponential(size=2000))[2] < 0.25


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rate", [0.03, 0.1])
def test_expand_finds_exactly_the_planted_group(rate: float, seed: int) -> None:
    scan, poisoned = sample(seed=seed, targets=(2,), rate=rate)
    report = lowest(scan)
    seeds = report.select(0.02)
    assert (seeds & poisoned).sum() >= MIN_SEEDS and not (poisoned <= seeds).all()
    selection = expand(report, scan, fraction=0.02)
    precision, recall = precision_and_recall(selection.suspect, poisoned)
    assert precision > 0.98 and recall > 0.98
    group = next(group for group in selection.groups if group.label == 2)
    assert group.distinct and group.size == selection.suspect.sum() and group.seeds == (seeds & (scan.labels == 2)).sum()
    assert not any(group.distinct for group in selection.groups if group.label != 2)
    assert selection.doubt.dtype == np.float32 and (selection.doubt[poisoned] > 0.5).mean() > 0.98


@pytest.mark.parametrize("copies", [1, 4])
def test_a_probe_does_not_know_a_sample_by_its_copy(copies: int) -> None:
    clean, _ = sample(count=500, targets=(), rate=0.0)
    every = np.repeat(np.arange(500), copies)
    scan = dataclasses.replace(
        clean, features=clean.features[every], losses=clean.losses[every], logits=clean.logits[every], labels=clean.labels[every]
    )
    selection = expand(lowest(scan), scan, fraction=0.25)
    assert not selection.suspect.any() and not any(group.distinct for group in selection.groups)
    planted, poisoned = sample(count=2000, targets=(2,), rate=0.1)
    every = np.r_[np.arange(2000), np.repeat(np.flatnonzero(poisoned), copies - 1)]
    scan = dataclasses.replace(
        planted, features=planted.features[every], losses=planted.losses[every], logits=planted.logits[every],
        labels=planted.labels[every],
    )  # fmt: skip
    assert min(precision_and_recall(expand(lowest(scan), scan, fraction=0.05).suspect, poisoned[every])) > 0.98


@pytest.mark.parametrize("others", [100, 400])
def test_a_probe_is_fitted_to_its_class_and_a_bounded_number_of_others_by_one_thread(
    others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan, poisoned = sample(count=5000, targets=(2,), rate=0.1)
    rows: list[int] = []
    threads: set[int] = set()

    class Counting(LogisticRegression):
        def fit(self, told: NDArray[np.float32], *rest: object) -> LogisticRegression:
            rows.append(len(told))
            threads.update(library["num_threads"] for library in threadpool_info())
            return super().fit(told, *rest)

    monkeypatch.setattr(select, "OTHERS", others)
    monkeypatch.setattr(select, "probe", lambda: Counting(C=0.1, class_weight="balanced", max_iter=200))
    with threadpool_limits(2):
        precision, recall = precision_and_recall(expand(lowest(scan), scan, fraction=0.02).suspect, poisoned)
    assert precision > 0.98 and recall > 0.98
    assert 0 < max(rows) <= np.bincount(scan.labels).max() + others
    assert threads == {1}  # two wait for each other in products this small


def test_two_target_classes_are_both_found() -> None:
    scan, poisoned = sample(targets=(0, 3), rate=0.1)
    selection = expand(lowest(scan), scan, fraction=0.06)
    precision, recall = precision_and_recall(selection.suspect, poisoned)
    assert precision > 0.98 and recall > 0.98
    assert [group.label for group in selection.groups if group.distinct] == [0, 3]


@pytest.mark.parametrize("seed", range(4))
def test_poison_that_is_most_of_its_class_is_found_from_seeds_among_it(seed: int) -> None:
    # Clean-label: at first the probe takes poison outside the seeds for clean, and the few clean ones are the foot of one hump.
    scan, poisoned = sample(seed=seed)
    poisoned[np.random.default_rng(seed).permutation(np.flatnonzero(scan.labels == 2))[: round(0.16 * len(scan))]] = True
    scan.features[poisoned, -3] += 14
    scan = dataclasses.replace(scan, losses=np.where(poisoned, 0.05, 1.0).astype(np.float32) * scan.losses)
    report = lowest(scan)
    seeds = report.select(0.1) & (scan.labels == 2)
    assert poisoned[seeds].mean() > 0.98 and seeds.sum() < 0.7 * poisoned.sum() < 0.7 * (scan.labels == 2).sum()
    precision, recall = precision_and_recall(expand(report, scan, fraction=0.1).suspect, poisoned)
    assert precision > 0.98 and recall > 0.98


def test_a_group_that_leaves_too_few_of_its_class_to_compare_it_with_is_not_accused() -> None:
    whole, _ = sample()
    rows = np.r_[np.flatnonzero(whole.labels != 2), np.flatnonzero(whole.labels == 2)[: 4 * MIN_SEEDS]]
    for left, found in ((MIN_SEEDS, True), (MIN_SEEDS - 1, False)):
        apart = np.arange(len(rows)) >= len(rows) - 4 * MIN_SEEDS + left
        features = whole.features[rows] + 20 * apart[:, None] * np.eye(DIM, dtype=np.float32)[-3]
        losses = np.where(apart, 0.001, 1.0).astype(np.float32) * whole.losses[rows]
        scan = Scan(whole.labels[rows], losses, whole.logits[rows], features)
        selection = expand(lowest(scan), scan, fraction=0.02)
        (group,) = selection.groups
        assert group.distinct and group.size == apart.sum() and selection.suspect.any() == found


@pytest.mark.parametrize("fraction", [0.05, 0.1])
@pytest.mark.parametrize("seed", range(10))
def test_on_clean_data_nobody_is_accused(seed: int, fraction: float) -> None:
    # Losses hang on the features here, as they do in life: the seeds of a class do stand at one of its ends.
    scan, _ = sample(seed=seed)
    report = lowest(scan)
    assert np.bincount(scan.labels[report.select(fraction)], minlength=CLASSES).max() >= MIN_SEEDS
    selection = expand(report, scan, fraction=fraction)
    assert not selection.suspect.any() and not selection.doubt.any()
    assert len(selection.groups) > 0 and not any(group.distinct for group in selection.groups)


def test_on_few_clean_samples_with_many_features_nobody_is_accused() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 1500)
    features = rng.normal(size=(1500, 200)) + 3 * np.eye(CLASSES, 200)[labels]
    losses = np.exp(-0.8 * features[np.arange(1500), labels] + 2 * rng.normal(size=1500))
    scan = Scan(labels, losses.astype(np.float32), np.zeros((1500, CLASSES), np.float32), features.astype(np.float32))
    assert not expand(lowest(scan), scan, fraction=0.1).suspect.any()


def test_in_a_trained_network_a_half_that_is_not_learned_better_than_the_rest_is_not_accused() -> None:
    # Half of class 2 carries wrong labels: the class falls in two, and its right half has the lowest losses of the class.
    scan, wrong = sample(targets=(2,), rate=0.1)
    losses = np.random.default_rng(0).random(len(scan)) + 2 * wrong
    right = Scan(scan.labels, (losses - 0.3 * (scan.labels == 2) * ~wrong).astype(np.float32), scan.logits, scan.features)
    selection = expand(lowest(right), right, fraction=0.05, trained=True)
    group = next(group for group in selection.groups if group.label == 2)
    assert group.distinct and 0.5 < group.lead < MIN_LEAD and not selection.suspect.any()


@pytest.mark.parametrize("seed", range(3))
def test_in_a_trained_network_the_half_with_the_lower_losses_is_found_without_seeds(seed: int) -> None:
    scan, poisoned = sample(seed=seed, targets=(2,), rate=0.05, shift=12)
    rng = np.random.default_rng(seed)
    losses = np.where(poisoned, 0.2, 1.0) * rng.random(len(scan))  # the lowest 1 % are anybody's
    trained = Scan(scan.labels, losses.astype(np.float32), scan.logits, scan.features)
    selection = expand(lowest(trained), trained, fraction=0.01, trained=True)
    precision, recall = precision_and_recall(selection.suspect, poisoned)
    assert precision > 0.98 and recall > 0.98
    clean, _ = sample(seed=seed)
    assert not expand(lowest(clean), clean, fraction=0.05, trained=True).suspect.any()


def test_of_a_small_set_there_are_seeds_enough() -> None:
    scan, poisoned = sample(targets=(2,), rate=0.1)
    selection = expand(lowest(scan), scan, fraction=1 / len(scan))
    assert [group.seeds for group in selection.groups] == [MIN_SEEDS]
    assert precision_and_recall(selection.suspect, poisoned) > (0.95, 0.95)


def test_scaling_features_changes_nothing() -> None:
    scan, _ = sample(targets=(2,), rate=0.1)
    scaled = Scan(scan.labels, scan.losses, scan.logits, (scan.features * np.logspace(-3, 3, DIM) + 5).astype(np.float32))
    first, second = (expand(lowest(scan), seen, fraction=0.05) for seen in (scan, scaled))
    assert (first.suspect == second.suspect).mean() > 0.999


def test_a_previous_group_is_carried_on_and_grows() -> None:
    early, poisoned = sample(targets=(2,), rate=0.1)
    found = expand(lowest(early), early, fraction=0.05)
    # Later, losses tell nothing any more; a part of the group as previous is enough to grow all of it from the features.
    later = Scan(early.labels, np.random.default_rng(1).random(len(early)).astype(np.float32), early.logits, early.features)
    part = Selection(found.suspect & (np.random.default_rng(2).random(len(early)) < 0.5), found.doubt, found.groups)
    alone = expand(lowest(later), later, fraction=0.01)
    assert not alone.suspect.any()
    grown = expand(lowest(later), later, fraction=0.01, previous=part)
    precision, recall = precision_and_recall(grown.suspect, poisoned)
    assert precision > 0.98 and recall > 0.98 and part.suspect.sum() < 0.6 * grown.suspect.sum()
    # A pass whose features show nothing leaves the earlier group as it was.
    blank = np.random.default_rng(3).normal(size=early.features.shape).astype(np.float32)
    kept = expand(lowest(later), Scan(early.labels, later.losses, early.logits, blank), fraction=0.01, previous=found)
    np.testing.assert_array_equal(kept.suspect, found.suspect)
    np.testing.assert_array_equal(kept.doubt, found.doubt)
    assert [group for group in kept.groups if group.distinct] == [group for group in found.groups if group.distinct]
    assert found.suspect.sum() == expand(lowest(early), early, fraction=0.05).suspect.sum()  # previous is not written to


def test_take_fraction_takes_exactly_that() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=1000)
    for fraction, count in ((0.05, 50), (0.0505, 50), (0.5, 500)):
        selection = take_fraction(SuspectReport(scores, np.zeros(1000), "d"), fraction)
        assert selection.suspect.sum() == count and selection.groups == ()
        assert scores[selection.suspect].min() > scores[~selection.suspect].max()
        np.testing.assert_array_equal(selection.doubt, selection.suspect)


def test_classes_in_which_nobody_can_be_accused_are_known_beforehand() -> None:
    assert small_classes(np.arange(800) % 20, 20) == 0 and small_classes(np.arange(799) % 20, 20) == 1
    assert small_classes(np.arange(30_000) % 1000, 1000) == 1000  # however many seeds there are
    assert small_classes(np.arange(60) % 3, 5) == 5  # two have no sample at all


@pytest.mark.parametrize(
    ("sure", "few", "accused"), [(0.34, True, True), (0.33, True, False), (0.12, False, True), (0.11, False, False)]
)
def test_of_few_classes_names_must_be_surer(sure: float, few: bool, accused: bool) -> None:
    assert Group(0, 0, 4.0, 0.9, 40, 0.0, named=0.1, sure=sure, spread=0.9, few=few).foreign is accused
