from __future__ import annotations

import numpy as np
import pytest

from nab_defense.relabel import relabelers
from nab_defense.relabel.knn import KNN, knn_votes


def naive_votes(queries: np.ndarray, features: np.ndarray, position: np.ndarray, k: int) -> np.ndarray:
    votes = np.zeros((len(queries), position.max() + 1))
    for i, query in enumerate(queries):
        cosines = [float(query @ f / np.linalg.norm(query) / np.linalg.norm(f)) for f in features]
        for j in sorted(range(len(features)), key=lambda j: -cosines[j])[:k]:
            votes[i, position[j]] += (1 + cosines[j]) / 2
    return votes / votes.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("k", [1, 7, 100])
def test_equals_brute_force(k: int) -> None:
    rng = np.random.default_rng(0)
    queries, features = rng.normal(size=(9, 4)).astype(np.float32), rng.normal(size=(40, 4)).astype(np.float32)
    position = rng.integers(0, 3, 40)
    votes = knn_votes(queries, features, position, k=k)
    np.testing.assert_allclose(votes, naive_votes(queries, features, position, k), atol=1e-5)
    np.testing.assert_allclose(votes.sum(axis=1), 1, atol=1e-6)


def test_follows_a_class_of_two_groups(make_scan) -> None:
    # Class 0 lies on both sides of class 1, so their centers coincide and only neighbors tell them apart.
    rng = np.random.default_rng(0)
    angle = np.concatenate([np.repeat([-1, 1], 100), np.zeros(200)]) + rng.normal(scale=0.1, size=400)
    features, truth = np.stack([np.cos(angle), np.sin(angle)], axis=1), np.repeat([0, 1], 200)
    suspect = np.arange(400) % 8 == 0
    labels = np.where(suspect, 1 - truth, truth)
    new_labels, confidence = relabelers.create("knn").relabel(make_scan(features, labels), suspect)
    np.testing.assert_array_equal(new_labels, truth)
    assert confidence[suspect].min() > 0.9


def test_confidence_falls_where_neighbors_disagree(make_scan) -> None:
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(size=(100, 6)), rng.normal(size=(100, 6)) + 8 * np.eye(6)[0]])
    labels = np.concatenate([rng.integers(0, 2, 100), np.full(100, 2)])
    suspect = np.arange(200) % 5 == 0
    confidence = KNN(k=10).relabel(make_scan(features, labels), suspect)[1]
    assert confidence[:100][suspect[:100]].mean() < 0.8 < 0.95 < confidence[100:][suspect[100:]].mean()


def test_refuses_k_below_one() -> None:
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        KNN(k=0)
