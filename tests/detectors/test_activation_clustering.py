from __future__ import annotations

import numpy as np
import pytest

from nab_defense.detectors import detectors
from nab_defense.detectors.activation_clustering import ActivationClustering, split_class, two_means

SEEDS = range(10)


def clean_classes(seed: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Three classes of 200 samples in 32 dimensions, each one group: round, elongated, overlapping, or skewed."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1, 2], 200)
    noise = rng.gamma(4, size=(600, 32)) / 2 if kind == "skewed" else rng.normal(size=(600, 32))
    if kind == "elongated":
        noise *= np.geomspace(8, 0.1, 32)
    distance = 0.5 if kind == "overlapping" else 4.0
    return (noise + distance * rng.normal(size=(3, 32))[labels]).astype(np.float32), labels


def test_two_means_finds_the_two_groups() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(100, 3)).astype(np.float32)
    points[:30] += 20
    distance = two_means(points, seed=0)
    near = distance[:, 0] < distance[:, 1]
    assert near[:30].all() != near[30:].all() and near.sum() in (30, 70)
    centers = [points[:30].mean(axis=0), points[30:].mean(axis=0)]
    expected = np.stack([np.linalg.norm(points - c, axis=1) for c in (centers if near[0] else centers[::-1])], axis=1)
    np.testing.assert_allclose(distance, expected, rtol=1e-4)


def test_margin_is_positive_in_the_smaller_cluster_alone() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(100, 12)).astype(np.float32)
    features[:20] += 6
    split = split_class(features, dims=10, seed=0)
    np.testing.assert_array_equal(split.margin > 0, np.arange(100) < 20)
    assert split.fraction == 0.2 and np.abs(split.margin).max() <= 1
    assert split.silhouette > split.null + 0.2


@pytest.mark.parametrize("kind", ["round", "elongated", "overlapping", "skewed"])
def test_accuses_nobody_on_clean_classes(kind: str, make_scan) -> None:
    accused = 0
    for seed in SEEDS:
        accused += (ActivationClustering().detect(make_scan(*clean_classes(seed, kind))).scores > 0).sum()
    assert accused == 0


def test_the_null_follows_the_shape_of_the_class() -> None:
    nulls = {}
    for kind in ("round", "elongated"):
        split = split_class(clean_classes(0, kind)[0][:200], dims=10, seed=0)
        assert abs(split.silhouette - split.null) < 0.05
        nulls[kind] = split.null
    assert nulls["elongated"] > nulls["round"] + 0.05  # so no fixed threshold on the silhouette serves both


@pytest.mark.parametrize(("kind", "shift"), [("round", 2.4), ("overlapping", 2.4), ("elongated", 10)])
@pytest.mark.parametrize("count", [20, 60])
def test_accuses_the_planted_class_only(kind: str, shift: float, count: int, make_scan) -> None:
    for seed in SEEDS[:3]:
        features, labels = clean_classes(seed, kind)
        poisoned = np.arange(600) < count
        features[poisoned] += shift * np.sign(np.random.default_rng(seed).normal(size=32)).astype(np.float32)
        scores = ActivationClustering().detect(make_scan(features, labels)).scores
        assert (poisoned == (scores > 0)).mean() > 0.995
        assert scores[labels != 0].max() <= -1 <= scores[labels == 0].min()


def test_leaves_two_halves_alone(make_scan) -> None:
    # Two equal groups are no minority: the stated limit of the method.
    features, labels = clean_classes(0, "round")
    features[:100] += 5
    assert (ActivationClustering().detect(make_scan(features, labels)).scores <= 0).all()
    assert ActivationClustering(max_fraction=0.5).accuses(split_class(features[:190], dims=10, seed=0))


def test_the_same_seed_gives_the_same_bits(make_scan) -> None:
    scan = make_scan(*clean_classes(0, "round"))
    first, second = (detectors.create("activation_clustering").detect(scan) for _ in range(2))
    np.testing.assert_array_equal(first.scores, second.scores)
    assert first.params == {"dims": 10, "max_fraction": 0.35, "min_excess": 0.08, "seed": 0}


def test_small_and_constant_classes_are_not_accused(make_scan) -> None:
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(size=(8, 4)), np.ones((40, 4))])
    features[:2] += 50
    assert (ActivationClustering().detect(make_scan(features, [0] * 8 + [1] * 40)).scores <= 0).all()


@pytest.mark.parametrize("knobs", [{"dims": 0}, {"max_fraction": 0.0}, {"max_fraction": 0.6}])
def test_refuses_knobs_out_of_range(knobs: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(knobs))} must be .* got {next(iter(knobs.values()))}"):
        detectors.create("activation_clustering", **knobs)
