from __future__ import annotations

import numpy as np
import pytest
import torch

from nab_defense import principal
from nab_defense.detectors import activation_clustering, spectral
from nab_defense.principal import Standardized, project


def features(count: int = 500) -> np.ndarray:
    rng = np.random.default_rng(0)
    spread = np.array([9, 5, 3, 1, 1, 1, 0.5, 0.1])
    return (100 + rng.standard_normal((count, 8)) * spread).astype(np.float32)


@pytest.fixture(params=[7, 1000])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    for module in (principal, spectral, activation_clustering):
        monkeypatch.setattr(module, "BLOCK", request.param)
    return int(request.param)


def test_projections_are_those_of_a_singular_value_decomposition(block: int) -> None:
    table, rows = features(), np.flatnonzero(np.arange(500) % 3)
    centered = table[rows].astype(np.float64) - table[rows].mean(0, dtype=np.float64)
    expected = centered @ np.linalg.svd(centered, full_matrices=False)[2][:3].T
    found = project(table, rows, 3)
    assert found.shape == (len(rows), 3) and found.dtype == np.float32
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=0.01)


def test_large_classes_get_the_scores_of_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    table, labels = features(), np.arange(500) % 2
    whole = spectral.class_spectral_scores(table, labels, rank=2)
    split = activation_clustering.split_class(table, dims=3, seed=0)
    for module in (principal, spectral, activation_clustering):
        monkeypatch.setattr(module, "BLOCK", 100)
    np.testing.assert_allclose(spectral.class_spectral_scores(table, labels, rank=2), whole, rtol=1e-3, atol=1e-4)
    blocks = activation_clustering.split_class(table, dims=3, seed=0)
    # directions keep their sign or turn around, and k-means then starts from other points
    assert abs(blocks.fraction - split.fraction) < 0.05 and blocks.silhouette == pytest.approx(split.silhouette, abs=0.02)


def test_spectral_scores_of_a_shifted_class_are_unchanged(block: int) -> None:
    table = features()
    moved = spectral.spectral_scores(torch.from_numpy(table + 50)).numpy()
    np.testing.assert_allclose(np.square(project(table, np.arange(500), 1))[:, 0], moved, rtol=1e-2, atol=1e-2)


def test_asked_rows_are_those_of_the_whole_standardized_table(block: int) -> None:
    rng = np.random.default_rng(0)
    wide, narrow = rng.normal(50, 3, (500, 6)).astype(np.float32), rng.exponential(2, (500, 2)).astype(np.float32)
    wide[:, 3] = 7  # a feature that never fires
    rows = np.flatnonzero(np.arange(500) % 3)
    whole = np.c_[wide, narrow].astype(np.float64)
    spread = np.where(whole.std(0) > 0, whole.std(0), 1)
    both = Standardized(wide, narrow)
    assert both.shape == (500, 8) and both[rows].dtype == np.float32
    np.testing.assert_allclose(both[rows], ((whole - whole.mean(0)) / spread)[rows], atol=1e-4)
