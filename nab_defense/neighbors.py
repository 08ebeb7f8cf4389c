"""Nearest neighbors and k-means by faiss: exact while that is quick, through an index above; the same on every run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import faiss
import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import kmeans_plusplus
from sklearn.preprocessing import normalize

__all__ = ["EXACT_WORK", "cluster", "first_centers", "neighbors", "threads"]

Rows = NDArray[np.float32]
Found = tuple[slice, Rows, NDArray[np.int64]]
EXACT_WORK = 2e12  # queries x rows x dims: 125,000 rows of 128 against themselves; below, building an index does not pay
MOST_EXACT = 100  # neighbors; an index looks at too few rows for more
QUERIES = 65_536  # a block in an exact search
RERANKED = 2_048  # queries whose candidates are gathered at once
PROBES = 96
ITERATIONS = 25
SAMPLE = 20_000  # rows in all, and
SAMPLE_EACH = 1_000  # rows a center, that k-means looks at
SEEDS_EACH = 64  # rows a center, among which k-means++ chooses
TRIALS = 20  # of which it keeps the best at each step; scikit-learn's 2 + log k leave some of 100 groups without a center
ONE_THREAD = 1e8  # points x centers x dims


def neighbors(queries: Rows, rows: Rows, k: int, *, exact_work: float = EXACT_WORK) -> Iterator[Found]:
    """The k rows of largest cosine similarity to each query, block by block, so that memory does not grow with the queries.

    Up to `exact_work` every query is compared with every row. Above, an inverted file [Jegou et al. 2011, TPAMI 33(1)] of
    4 sqrt(N) lists, taught on 64 rows a list, holds the rows as 8-bit codes, a quarter of their size; the 96 lists nearest to a
    query give 2 k candidates, which are compared exactly. `nab bench --speed knn growth` measures the recall. Product codes of a
    quarter of a byte a value lost a tenth of the neighbors at the same number of lists, so the larger codes are used.

    Args:
        queries: (Q, D), any scale; may be a memory-mapped file, as `rows` may.
        rows: (N, D), N >= k.
        k: Neighbors a query, >= 1.
        exact_work: Q * N * D up to which the search is exact.

    Yields:
        Which queries; (B, k) similarity in [-1, 1], falling, exact in both cases; (B, k) int64, rows. A query that finds
        fewer than k has -1 for the similarity of the others.
    """
    if len(queries) * len(rows) * rows.shape[1] <= exact_work or k > MOST_EXACT:
        unit = normalize(rows)
        for block in _blocks(len(queries), QUERIES):
            yield block, *faiss.knn(normalize(queries[block]), unit, k, metric=faiss.METRIC_INNER_PRODUCT)
        return
    index = _index(rows)
    for block in _blocks(len(queries), RERANKED):
        asked = normalize(queries[block])
        found = index.search(asked, 2 * k)[1]
        missing = found < 0
        found[missing] = 0
        near = normalize(rows[found.ravel()]).reshape(*found.shape, -1)
        similarity = np.einsum("qd,qcd->qc", asked, near)
        similarity[missing] = -1
        best = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        yield block, np.take_along_axis(similarity, best, axis=1), np.take_along_axis(found, best, axis=1)


def _blocks(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def _index(rows: Rows) -> faiss.Index:
    size, dims = rows.shape
    lists = int(4 * size**0.5)
    codes, metric = faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    coarse = faiss.IndexFlatIP(dims)
    index = faiss.IndexIVFScalarQuantizer(coarse, dims, lists, codes, metric)
    index.cp.niter, index.cp.seed = 10, 0
    taught = np.random.default_rng(0).permutation(size)[: 64 * lists]
    index.train(normalize(rows[np.sort(taught)]))
    for block in _blocks(size, QUERIES):
        index.add(normalize(rows[block]))
    index.nprobe = min(PROBES, lists)
    return index


def cluster(points: Rows, k: int, *, seed: int, restarts: int = 0) -> Rows:
    """Centers (k, D) of k-means.

    It takes 25 steps on a random 1,000 rows a center, and no fewer than 20,000 rows in all. A center is then off by 1 / 1,000 of
    the variance of its cluster, which raises the inertia by as much; a full pass in each step would only cost. The start is
    that of k-means++ [Arthur & Vassilvitskii 2007, greedy] on 64 rows a center: random ones leave whole groups without a
    center. For few centers `restarts` from random rows, of which the best one is kept, are quicker.

    Args:
        points: (N, D), N >= k; may be a memory-mapped file.
        k: Number of centers.
        seed: Of the sample and the first centers.
        restarts: Runs from random rows; 0: one from k-means++."""
    size, dims = points.shape
    each, start = max(SAMPLE_EACH, SAMPLE // k), first_centers(points, k, seed=seed) if restarts == 0 else None
    kmeans = faiss.Kmeans(
        dims, k, niter=ITERATIONS, nredo=max(restarts, 1), seed=seed, max_points_per_centroid=each, min_points_per_centroid=1
    )
    # On a busy machine threads would wait for each other at each tiny step.
    with threads(1) if min(size, each * k) * k * dims < ONE_THREAD else nullcontext():
        kmeans.train(points, init_centroids=start)
    return np.asarray(kmeans.centroids)


def first_centers(points: Rows, k: int, *, seed: int) -> Rows:
    """Centers (k, D) that `cluster` starts from, where it starts once."""
    rows = np.random.default_rng(seed).permutation(len(points))[: SEEDS_EACH * k]
    found: Rows = kmeans_plusplus(np.asarray(points[np.sort(rows)]), k, random_state=seed, n_local_trials=TRIALS)[0]
    return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Have faiss use so many threads, for a while."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
