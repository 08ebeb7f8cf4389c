from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from nab_defense.detectors import detectors
from nab_defense.detectors.spectral import Spectral, class_spectral_scores, spectral_scores


def planted(*, shift: float, center: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two classes of 300 samples in 16 dimensions; 30 of class 0 are moved by `shift` toward the origin or past it."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(600, 16)) + center
    poisoned = np.arange(600) < 30
    features[poisoned, :4] -= shift
    return features.astype(np.float32), np.repeat([0, 1], 300), poisoned


def naive_scores(features: np.ndarray, rank: int) -> np.ndarray:
    centered = features - features.mean(axis=0)
    values, vectors = np.linalg.eigh(centered.T @ centered)
    top = vectors[:, np.argsort(values)[::-1][:rank]]
    return np.array([sum(float(row @ v) ** 2 for v in top.T) for row in centered])


@pytest.mark.parametrize("shape", [(50, 8), (10, 40), (3, 2)])
@pytest.mark.parametrize("rank", [1, 2])
def test_equals_a_naive_reference(shape: tuple[int, int], rank: int) -> None:
    features = np.random.default_rng(1).normal(size=shape) * np.linspace(3, 1, shape[1])
    scores = spectral_scores(torch.from_numpy(features), rank=rank)
    np.testing.assert_allclose(scores.numpy(), naive_scores(features, rank), rtol=1e-9, atol=1e-12)


def test_a_shift_and_a_rotation_change_nothing() -> None:
    rng = np.random.default_rng(2)
    features = torch.from_numpy(rng.normal(size=(80, 6)) * [5, 3, 2, 1, 1, 1])
    rotation = torch.from_numpy(np.linalg.qr(rng.normal(size=(6, 6)))[0])
    torch.testing.assert_close(spectral_scores(features + 5), spectral_scores(features))
    torch.testing.assert_close(spectral_scores(features @ rotation), spectral_scores(features))


def test_all_directions_together_give_the_distance_to_the_mean() -> None:
    features = torch.from_numpy(np.random.default_rng(3).normal(size=(20, 5)))
    expected = (features - features.mean(dim=0)).square().sum(dim=1)
    torch.testing.assert_close(spectral_scores(features, rank=5), expected)


@pytest.mark.parametrize("center", [0.0, 5.0], ids=["away from the origin", "toward the origin"])
def test_finds_a_planted_shift(center: float) -> None:
    # Uncentered projections, as in some implementations, fail the second case.
    features, labels, poisoned = planted(shift=4.0, center=center)
    assert roc_auc_score(poisoned, class_spectral_scores(features, labels)) > 0.99


def test_is_blind_where_nothing_is_planted() -> None:
    areas = []
    for seed in range(10):
        features, labels, poisoned = planted(shift=0.0, seed=seed)
        areas.append(roc_auc_score(poisoned, class_spectral_scores(features, labels)))
    assert abs(np.mean(areas) - 0.5) < 0.05


def test_a_class_of_large_features_does_not_dominate() -> None:
    features, labels, poisoned = planted(shift=4.0)
    features[labels == 1] *= 1000
    scores = class_spectral_scores(features, labels)
    assert roc_auc_score(poisoned, scores) > 0.99
    assert scores[labels == 0].mean() == pytest.approx(1) and scores[labels == 1].mean() == pytest.approx(1)


def test_a_tiny_or_constant_class_scores_zero() -> None:
    features = np.array([[0, 0], [9, 9], [1, 1], [1, 1], [1, 1], [0, 1], [2, 0], [5, 5]], dtype=np.float32)
    scores = class_spectral_scores(features, np.array([0, 0, 1, 1, 1, 2, 2, 2]))
    assert (scores[:5] == 0).all() and (scores[5:] > 0).any()


def test_report_names_the_method_and_its_knobs(make_scan) -> None:
    features, labels, poisoned = planted(shift=4.0)
    report = detectors.create("spectral", rank=2).detect(make_scan(features, labels))
    assert (report.detector, report.params, report.fingerprint) == ("spectral", {"rank": 2}, "synthetic")
    assert poisoned[report.select(0.04)].mean() > 0.9


def test_refuses_a_rank_below_one() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        Spectral(rank=0)
