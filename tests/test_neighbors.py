from __future__ import annotations

import faiss
import numpy as np
import pytest
from sklearn.cluster import KMeans

from nab_defense.neighbors import cluster, neighbors


def clustered(count: int, dims: int, *, groups: int = 10, seed: int = 0) -> np.ndarray:
    """Groups that are long in 16 directions of their own, as the classes of a network's features are."""
    rng = np.random.default_rng(seed)
    group = rng.integers(0, groups, count)
    points = rng.standard_normal((groups, dims))[group] + 0.3 * rng.standard_normal((count, dims))
    for number in range(groups):
        rows = group == number
        points[rows] += 0.5 * rng.standard_normal((rows.sum(), 16)) @ rng.standard_normal((16, dims)) / 4
    return points.astype(np.float32)


def search(queries: np.ndarray, rows: np.ndarray, k: int, **knobs: float) -> tuple[np.ndarray, np.ndarray]:
    blocks = list(neighbors(queries, rows, k, **knobs))
    assert np.array_equal(np.concatenate([np.arange(b.start, b.stop) for b, _, _ in blocks]), np.arange(len(queries)))
    return np.concatenate([s for _, s, _ in blocks]), np.concatenate([i for _, _, i in blocks])


def test_exact_search_equals_brute_force() -> None:
    points = clustered(300, 8)
    similarity, neighbor = search(points[:50], points, 5)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    naive = np.argsort(-(unit[:50] @ unit.T), axis=1)[:, :5]
    assert np.array_equal(neighbor, naive)
    np.testing.assert_allclose(similarity, np.take_along_axis(unit[:50] @ unit.T, naive, axis=1), atol=1e-6)


def test_the_index_finds_95_of_100_neighbors_with_their_exact_similarity() -> None:
    points = clustered(20_000, 32)
    similarity, neighbor = search(points[:3000], points, 11, exact_work=0)
    _, exact = search(points[:3000], points, 11)
    recall = np.mean([np.isin(row, found).mean() for row, found in zip(exact[:, 1:], neighbor, strict=True)])
    assert recall >= 0.95
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    np.testing.assert_allclose(similarity, np.einsum("qd,qkd->qk", unit[:3000], unit[neighbor]), atol=1e-5)
    assert (np.diff(similarity, axis=1) <= 0).all()
    again = search(points[:3000], points, 11, exact_work=0)[1]
    assert np.array_equal(neighbor, again)


def test_a_query_without_enough_rows_in_reach_says_so() -> None:
    """All rows but one are alike and fill one list."""
    rows = np.tile(np.float32([1, 0]), (500, 1))
    rows[0] = [-1, 0]
    similarity, neighbor = search(rows[:1], rows, 3, exact_work=0)
    assert ((neighbor >= 0) & (neighbor < 500)).all() and (similarity[0, 1:] == -1).all() and similarity[0, 0] == pytest.approx(1)


@pytest.mark.parametrize("groups", [10, 100])
def test_kmeans_reaches_the_inertia_of_scikit_learn(groups: int) -> None:
    points = clustered(30_000, 32, groups=groups)
    centers = cluster(points, groups, seed=0)
    inertia = faiss.knn(points, centers, 1)[0].sum(dtype=np.float64)
    reference = KMeans(groups, n_init=1, random_state=0).fit(points).inertia_
    assert inertia < 1.01 * reference
    assert np.array_equal(centers, cluster(points, groups, seed=0))


def test_threads_are_given_back() -> None:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    try:
        cluster(clustered(100, 4), 2, seed=0)
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(before)
