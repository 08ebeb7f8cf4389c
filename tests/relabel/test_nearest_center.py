from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from nab_defense.relabel import relabelers
from nab_defense.relabel.base import merge, trusted_rows
from nab_defense.relabel.nearest_center import NearestCenter, fit_sharpness, trimmed_center


def flipped_classes(distance: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features, given labels, truth, suspects: three classes (2, 5, 7) of 200; every tenth is a suspect and mislabeled."""
    rng = np.random.default_rng(seed)
    position = np.repeat(np.arange(3), 200)
    features = (rng.normal(size=(600, 8)) + distance * np.eye(8)[position]).astype(np.float32)
    names, suspect = np.array([2, 5, 7]), np.arange(600) % 10 == 0
    return features, np.where(suspect, names[(position + 1) % 3], names[position]), names[position], suspect


@pytest.mark.parametrize("name", ["nearest_center", "knn"])
def test_recovers_the_labels_of_separated_classes(name: str, make_scan) -> None:
    features, labels, truth, suspect = flipped_classes(distance=10)
    new_labels, confidence = relabelers.create(name).relabel(make_scan(features, labels), suspect)
    np.testing.assert_array_equal(new_labels, truth)
    assert new_labels.dtype == np.int64 and confidence.dtype == np.float32
    assert confidence[suspect].min() > 0.9


@pytest.mark.parametrize("name", ["nearest_center", "knn"])
def test_the_others_keep_label_and_full_confidence(name: str, make_scan) -> None:
    features, labels, _, suspect = flipped_classes(distance=1)
    scan = make_scan(features, labels)
    before = labels.copy()
    new_labels, confidence = relabelers.create(name).relabel(scan, suspect)
    np.testing.assert_array_equal(new_labels[~suspect], before[~suspect])
    np.testing.assert_array_equal(scan.labels, before)
    assert (confidence[~suspect] == 1).all() and ((confidence >= 0) & (confidence <= 1)).all()


@pytest.mark.parametrize("name", ["nearest_center", "knn"])
def test_the_suspects_own_labels_are_not_read(name: str, make_scan) -> None:
    features, labels, _, suspect = flipped_classes(distance=3)
    other = np.where(suspect, 2, labels)
    first, second = (relabelers.create(name).relabel(make_scan(features, given), suspect) for given in (labels, other))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


@pytest.mark.parametrize("name", ["nearest_center", "knn"])
def test_without_suspects_nothing_changes(name: str, make_scan) -> None:
    features, labels, _, suspect = flipped_classes(distance=3)
    new_labels, confidence = relabelers.create(name).relabel(make_scan(features, labels), np.zeros_like(suspect))
    np.testing.assert_array_equal(new_labels, labels)
    assert (confidence == 1).all()


@pytest.mark.parametrize("distance", [1.0, 2.0, 4.0])
def test_confidence_is_calibrated(distance: float, make_scan) -> None:
    right, sure = [], []
    for seed in range(10):
        features, labels, truth, suspect = flipped_classes(distance, seed)
        new_labels, confidence = NearestCenter().relabel(make_scan(features, labels), suspect)
        right.append((new_labels == truth)[suspect].mean())
        sure.append(confidence[suspect].mean())
    assert np.mean(sure) == pytest.approx(np.mean(right), abs=0.06)


def test_a_point_between_two_classes_gets_half_the_confidence(make_scan) -> None:
    features, labels, _, suspect = flipped_classes(distance=10)
    features[0] = 5 * (np.eye(8)[0] + np.eye(8)[1])
    confidence = NearestCenter().relabel(make_scan(features, labels), suspect)[1]
    assert confidence[0] < 0.75 < np.median(confidence[suspect])


def test_trimming_ignores_a_stray_minority() -> None:
    unit = np.tile(np.array([[1, 0]], dtype=np.float32), (20, 1))
    unit[:2] = [0, 1]
    np.testing.assert_allclose(trimmed_center(unit, trim=0.1), [1, 0])
    np.testing.assert_allclose(trimmed_center(unit, trim=0), np.array([18, 2]) / np.hypot(18, 2), rtol=1e-6)


def test_sharpness_is_the_one_that_made_the_labels() -> None:
    rng = np.random.default_rng(0)
    similarity = rng.uniform(-1, 1, size=(20000, 4)).astype(np.float32)
    drawn = (softmax(7 * similarity, axis=1).cumsum(axis=1) > rng.random((20000, 1))).argmax(axis=1)
    assert fit_sharpness(similarity, drawn) == pytest.approx(7, rel=0.05)
    assert fit_sharpness(similarity, rng.integers(0, 4, 20000)) < 0.1


def test_sharpness_of_separable_classes_follows_from_their_number() -> None:
    position = np.arange(100) % 2
    sharpness = fit_sharpness(np.eye(2, dtype=np.float32)[position], position)
    assert sharpness == pytest.approx(np.log(101), rel=1e-3)  # the rule of succession: 101 of 102 right


def test_a_class_of_suspects_alone_is_named(make_scan) -> None:
    features, labels, _, suspect = flipped_classes(distance=3)
    for name in ("nearest_center", "knn"):
        with pytest.raises(ValueError, match="every sample of class 5 is a suspect"):
            relabelers.create(name).relabel(make_scan(features, labels), suspect | (labels == 5))


def test_trim_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"trim must be in .* got 0.6"):
        NearestCenter(trim=0.6)


def test_merge_puts_proposals_in_their_places(make_scan) -> None:
    scan, suspect = make_scan(np.zeros((4, 2)), [3, 1, 2, 0]), np.array([False, True, False, True])
    new_labels, confidence = merge(scan, suspect, np.array([0, 2]), np.array([0.5, 0.25]))
    assert new_labels.tolist() == [3, 0, 2, 2] and confidence.tolist() == [1, 0.5, 1, 0.25]


@pytest.mark.parametrize(
    ("proposed", "confidence", "message"),
    [
        ([0], [0.5, 0.5], r"proposed must have shape \(2,\)"),
        ([0, 1], [0.5], r"confidence must have shape \(2,\)"),
        ([0, -1], [0.5, 0.5], "proposed labels must be >= 0, got -1"),
        ([0, 1], [0.5, 1.5], "confidence must be in"),
        ([0, 1], [0.5, np.nan], "confidence must be in"),
    ],
)
def test_merge_refuses_what_does_not_fit(proposed: list[int], confidence: list[float], message: str, make_scan) -> None:
    scan, suspect = make_scan(np.zeros((4, 2)), [3, 1, 2, 0]), np.array([False, True, False, True])
    with pytest.raises(ValueError, match=message):
        merge(scan, suspect, np.array(proposed), np.array(confidence))


@pytest.mark.parametrize("suspect", [np.zeros(3, bool), np.zeros(4, int)])
def test_suspect_must_be_a_mask_of_the_scan(suspect: np.ndarray, make_scan) -> None:
    with pytest.raises(ValueError, match=r"suspect must be \(4,\) bool"):
        trusted_rows(make_scan(np.zeros((4, 2)), [3, 1, 2, 0]), suspect)
