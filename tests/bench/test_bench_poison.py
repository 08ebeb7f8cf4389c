"""Poisoning: who is poisoned, what the labels become, and that the truth survives the disk."""

from __future__ import annotations

import numpy as np
import pytest

from nab_defense.bench.attacks import create
from nab_defense.bench.poison import choose_poison, poison_source, read_truth, triggered_source, wanted_labels, write_truth
from nab_defense.data.sources import Source, open_source

LABELS = np.arange(1000) % 10


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_source("digits")


def choose(labels: np.ndarray = LABELS, **changes) -> np.ndarray:
    knobs = {"rate": 0.05, "target": 3, "mode": "all_to_one", "clean_label": False, "num_classes": 10}
    return choose_poison(labels, **{**knobs, **changes}, rng=np.random.default_rng(0))


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.29, 0.9])  # int(0.29 * 100) would be 28
def test_rate_is_a_share_of_the_whole_set(rate: float) -> None:
    chosen = choose(rate=rate)
    assert len(chosen) == round(rate * 1000)
    assert (np.diff(chosen) > 0).all() and chosen.dtype == np.int64
    assert (LABELS[chosen] != 3).all()


def test_the_draw_is_uniform_over_the_other_classes() -> None:
    hits = np.zeros(1000)
    rng = np.random.default_rng(1)
    for _ in range(400):
        hits[choose_poison(LABELS, rate=0.3, target=3, mode="all_to_one", clean_label=False, num_classes=10, rng=rng)] += 1
    assert hits[LABELS == 3].sum() == 0
    np.testing.assert_allclose(hits[LABELS != 3].mean(), 400 / 3)
    assert np.abs(hits[LABELS != 3] - 400 / 3).max() < 5 * np.sqrt(400 * 2 / 9)


def test_clean_label_draws_from_the_target_only() -> None:
    assert (LABELS[choose(clean_label=True)] == 3).all()
    assert len(choose(clean_label=True, rate=0.1)) == 100


def test_all_to_all_draws_from_every_class() -> None:
    assert set(LABELS[choose(mode="all_to_all", target=None, rate=0.5)]) == set(range(10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 0.0}, r"rate must be in \(0, 1\), got 0.0"),
        ({"rate": 1.0}, "got 1.0"),
        ({"rate": 0.0001}, "poisons none; the smallest possible is 0.001"),
        ({"rate": 0.95}, "the largest possible is 0.9"),
        ({"rate": 0.101, "clean_label": True}, "needs 101 images, .* hold 100; the largest possible is 0.1"),
        ({"target": 10}, r"target must be a class in 0..9, got 10"),
        ({"target": None}, "got None"),
        ({"mode": "all2one"}, "did you mean 'all_to_one'"),
        ({"mode": "all_to_all"}, "no single target, got target 3"),
        ({"mode": "all_to_all", "target": None, "clean_label": True}, "changes no label"),
    ],
)
def test_senseless_goals_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(**changes)


def test_wanted_labels() -> None:
    labels = np.array([0, 3, 9])
    np.testing.assert_array_equal(wanted_labels(labels, target=3, mode="all_to_one", num_classes=10), [3, 3, 3])
    np.testing.assert_array_equal(wanted_labels(labels, target=None, mode="all_to_all", num_classes=10), [1, 4, 0])


def test_poisoned_samples_change_and_the_others_do_not(digits: Source) -> None:
    attack = create("badnets")
    poisoned, truth = poison_source(digits, attack, rate=0.1, target=3, seed=5)
    assert truth.poisoned.sum() == round(0.1 * len(digits)) and not truth.cover.any()
    assert (truth.target, truth.mode) == (3, "all_to_one")
    np.testing.assert_array_equal(truth.true_labels, digits.labels)
    assert (poisoned.labels[truth.poisoned] == 3).all() and (digits.labels[truth.poisoned] != 3).all()
    np.testing.assert_array_equal(poisoned.labels[~truth.poisoned], digits.labels[~truth.poisoned])
    assert poisoned.ids == digits.ids and poisoned.image(0).mode == "L"
    for index in [*np.flatnonzero(truth.poisoned)[:5], *np.flatnonzero(~truth.poisoned)[:5]]:
        clean = digits.pixels(index)
        expected = attack.apply(clean[None], 0)[0] if truth.poisoned[index] else clean
        for _ in range(2):  # painted, then kept
            np.testing.assert_array_equal(poisoned.pixels(index), expected)


def test_all_to_all_moves_every_label_by_one(digits: Source) -> None:
    poisoned, truth = poison_source(digits, create("badnets"), rate=0.2, target=None, mode="all_to_all", seed=0)
    np.testing.assert_array_equal(poisoned.labels[truth.poisoned], (digits.labels[truth.poisoned] + 1) % 10)
    assert truth.target is None


def test_clean_label_changes_images_and_no_label(digits: Source) -> None:
    poisoned, truth = poison_source(digits, create("sig"), rate=0.05, target=7, seed=0)
    np.testing.assert_array_equal(poisoned.labels, digits.labels)
    assert (digits.labels[truth.poisoned] == 7).all()
    first = int(np.flatnonzero(truth.poisoned)[0])
    assert (poisoned.pixels(first) != digits.pixels(first)).any()


def test_covers_keep_their_label_and_are_not_poison(digits: Source) -> None:
    attack = create("wanet", covers=2)
    poisoned, truth = poison_source(digits, attack, rate=0.1, target=0, seed=0)
    assert truth.cover.sum() == 2 * truth.poisoned.sum() and not (truth.cover & truth.poisoned).any()
    np.testing.assert_array_equal(poisoned.labels[truth.cover], digits.labels[truth.cover])
    first, second = np.flatnonzero(truth.cover)[:2]
    assert (poisoned.pixels(first) != attack.apply(digits.pixels(first)[None], 0)[0]).any()
    again, _ = poison_source(digits, attack, rate=0.1, target=0, seed=0)
    np.testing.assert_array_equal(again.pixels(second), poisoned.pixels(second))
    with pytest.raises(ValueError, match=r"covers asks for .* lower it"):
        poison_source(digits, create("wanet", covers=9.5), rate=0.1, target=0, seed=0)


def test_the_fingerprint_follows_every_setting(digits: Source) -> None:
    def mark(name: str = "badnets", *, rate: float = 0.1, target: int = 3, seed: int = 0, **knobs) -> str:
        return poison_source(digits, create(name, **knobs), rate=rate, target=target, seed=seed)[0].fingerprint

    marks = [
        mark(),
        mark(seed=1),
        mark(rate=0.1001),
        mark(target=4),
        mark("blend"),
        mark(size=3),
        mark(margin=0),
        digits.fingerprint,
    ]
    assert len(set(marks)) == len(marks) and mark() == marks[0]


def test_triggered_test_set_leaves_the_target_out(digits: Source) -> None:
    attack = create("badnets")
    triggered, true_labels = triggered_source(digits, attack, target=3, seed=0)
    kept = np.flatnonzero(digits.labels != 3)
    assert len(triggered) == len(kept) == len(true_labels)
    assert (triggered.labels == 3).all()
    np.testing.assert_array_equal(true_labels, digits.labels[kept])
    assert triggered.ids == tuple(digits.ids[i] for i in kept)
    for position in (0, 17, len(kept) - 1):
        np.testing.assert_array_equal(triggered.pixels(position), attack.apply(digits.pixels(kept[position])[None], 0)[0])


def test_triggered_test_set_of_all_to_all_keeps_everything(digits: Source) -> None:
    triggered, true_labels = triggered_source(digits, create("blend"), target=None, mode="all_to_all", seed=0)
    np.testing.assert_array_equal(true_labels, digits.labels)
    np.testing.assert_array_equal(triggered.labels, (digits.labels + 1) % 10)
    with pytest.raises(ValueError, match=r"holds no image that Blend.* can be tested on, for target 1"):
        triggered_source(digits.subset(np.flatnonzero(digits.labels == 1)), create("blend"), target=1, seed=0)


@pytest.mark.parametrize("name", ["badnets", "sig", "wanet"])
def test_truth_round_trip(digits: Source, tmp_path, name: str) -> None:
    knobs = {"covers": 1} if name == "wanet" else {}
    poisoned, truth = poison_source(digits, create(name, **knobs), rate=0.05, target=2, seed=0)
    write_truth(tmp_path / "truth.csv", poisoned, truth)
    header = (tmp_path / "truth.csv").read_text().splitlines()[0]
    assert header == "id,poisoned,true_label,label" + (",cover" if knobs else "")
    order = np.random.default_rng(0).permutation(len(poisoned))  # found again by id, whatever the order
    back = read_truth(tmp_path / "truth.csv", poisoned.subset(order))
    for field in ("poisoned", "true_labels", "cover"):
        np.testing.assert_array_equal(getattr(back, field), getattr(truth, field)[order])
    assert (back.target, back.mode) == (2, "all_to_one")


def test_truth_of_all_to_all_and_of_clean_data(digits: Source, tmp_path) -> None:
    poisoned, truth = poison_source(digits, create("blend"), rate=0.05, target=None, mode="all_to_all", seed=0)
    write_truth(tmp_path / "truth.csv", poisoned, truth)
    back = read_truth(tmp_path / "truth.csv", poisoned)
    assert (back.target, back.mode) == (None, "all_to_all")
    rows = "".join(f"{name},0,{y},{y}\n" for name, y in zip(digits.ids, digits.labels, strict=True))
    (tmp_path / "clean.csv").write_text("id,poisoned,true_label,label\n" + rows)
    assert not read_truth(tmp_path / "clean.csv", digits).poisoned.any()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("digits/0000,0,0,0\n", "", "lacks 1 of the 4 ids of digits, first 'digits/0000'"),
        ("digits/0000,", "digits/9999,", "lacks 1 of"),
        ("digits/0000,0,0,0\n", "digits/0000,0,0,0\nextra,0,0,0\n", "has 1 ids that digits lacks, first 'extra'"),
        ("digits/0000,0,0,0\n", "digits/0000,0,0,0\n" * 2, "two rows for 'digits/0000'"),
        ("digits/0000,0,0,0", "digits/0000,0,0,1", "label '1', digits has '0'"),
        ("digits/0000,0,0,0", "digits/0000,0,zero,0", "true_label 'zero' of 'digits/0000' is not a class"),
        ("digits/0000,0,0,0", "digits/0000,maybe,0,0", "must be 0 or 1, got 'maybe'"),
        ("digits/0000,0,0,0", "digits/0000,0", "label None of 'digits/0000' is not a class"),
        ("true_label", "truth", "no column 'true_label'"),
    ],
)
def test_truth_of_other_data_is_refused(digits: Source, tmp_path, old: str, new: str, message: str) -> None:
    few = digits.subset([0, 1, 2, 3])
    poisoned, truth = poison_source(few, create("badnets"), rate=0.25, target=0, seed=0)
    path = tmp_path / "truth.csv"
    write_truth(path, poisoned, truth)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_truth(path, poisoned)
