from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from nab_defense.detectors import detectors
from nab_defense.detectors.knn import KNN, knn_disagreement


def naive_scores(features: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    scores = []
    for i in range(len(labels)):
        similarity = unit @ unit[i]
        nearest = sorted((j for j in range(len(labels)) if j != i), key=lambda j: -similarity[j])[:k]
        weights = np.array([(1 + similarity[j]) / 2 for j in nearest])
        scores.append(weights[labels[nearest] != labels[i]].sum() / weights.sum())
    return np.array(scores)


def classes_and_flips(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Four separated classes of 100 samples; every tenth label is moved on by one."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(4), 100)
    features = rng.normal(size=(400, 8)) + 6 * np.eye(8)[truth]
    flipped = np.arange(400) % 10 == 0
    return features.astype(np.float32), np.where(flipped, (truth + 1) % 4, truth), flipped


@pytest.mark.parametrize("k", [1, 5, 200])
def test_equals_brute_force(k: int) -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 5)).astype(np.float32), rng.integers(0, 3, 60)
    np.testing.assert_allclose(knn_disagreement(features, labels, k=k), naive_scores(features, labels, k), atol=1e-5)


def test_finds_flipped_labels() -> None:
    features, labels, flipped = classes_and_flips()
    assert roc_auc_score(flipped, knn_disagreement(features, labels, k=15)) > 0.99


def test_is_blind_where_features_say_nothing() -> None:
    areas = []
    for seed in range(5):
        _, labels, flipped = classes_and_flips()
        noise = np.random.default_rng(seed).normal(size=(400, 8)).astype(np.float32)
        areas.append(roc_auc_score(flipped, knn_disagreement(noise, labels, k=15)))
    assert abs(np.mean(areas) - 0.5) < 0.07


def test_scale_does_not_matter() -> None:
    features, labels, _ = classes_and_flips()
    scale = np.random.default_rng(1).uniform(0.1, 10, size=(400, 1)).astype(np.float32)
    np.testing.assert_allclose(
        knn_disagreement(features * scale, labels, k=5), knn_disagreement(features, labels, k=5), atol=1e-5
    )


def test_a_sample_is_not_its_own_neighbor_among_duplicates() -> None:
    features = np.ones((6, 3), dtype=np.float32)
    np.testing.assert_allclose(knn_disagreement(features, np.array([0, 0, 0, 0, 0, 1]), k=5), [0.2] * 5 + [1])


def test_few_samples() -> None:
    one = np.ones((1, 2), dtype=np.float32)
    assert knn_disagreement(one, np.array([0]), k=15).tolist() == [0]
    opposite = np.array([[1, 0], [-1, 0]], dtype=np.float32)
    assert knn_disagreement(opposite, np.array([0, 1]), k=15).tolist() == [1, 1]


def test_report_selects_the_flips(make_scan) -> None:
    features, labels, flipped = classes_and_flips()
    report = detectors.create("knn", k=10).detect(make_scan(features, labels))
    assert (report.detector, report.params) == ("knn", {"k": 10})
    np.testing.assert_array_equal(report.select(0.1), flipped)


def test_refuses_k_below_one() -> None:
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        KNN(k=0)
