"""Clusters and neighbors of synthetic features: faiss beside scikit-learn, and how cost grows with their number."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from ..detectors import detectors
from ..neighbors import cluster, first_centers, neighbors
from ..neighbors import threads as allowed_threads
from ..scan import Scan
from .timing import peak_memory, seconds, side_by_side

__all__ = ["clustered", "growth", "kmeans", "knn"]

Rows = NDArray[np.float32]
BLOCK = 50_000
LONG = 16  # directions that a group is long in


def clustered(rows: int, dims: int, *, groups: int, seed: int = 0, out: Rows | None = None) -> tuple[Rows, NDArray[np.int64]]:
    """Features (rows, dims) and their groups (rows,): like a network's classes, each group is long in some directions of its own.

    Args:
        rows, dims, groups: How many.
        seed: Of everything.
        out: Where to write them, such as a memory-mapped file."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((groups, dims), dtype=np.float32)
    axes = rng.standard_normal((groups, LONG, dims), dtype=np.float32) / LONG**0.5
    group = rng.integers(0, groups, rows)
    points = np.empty((rows, dims), dtype=np.float32) if out is None else out
    for first in range(0, rows, BLOCK):
        own = group[first : first + BLOCK]
        part = centers[own] + 0.3 * rng.standard_normal((len(own), dims), dtype=np.float32)
        long = 0.5 * rng.standard_normal((len(own), LONG), dtype=np.float32)
        for number in np.unique(own):
            part[own == number] += long[own == number] @ axes[number]
        points[first : first + BLOCK] = part
    return points, group


def kmeans(
    *,
    rows: int = 200_000,
    dims: int = 384,
    centers: Sequence[int] = (10, 100),
    threads: Sequence[int] = (1, 2),
    repeats: int = 3,
    patience: float = 30,
) -> dict[str, Any]:
    """scikit-learn's KMeans, one run from k-means++, over cluster() and the assignment of all rows; and the ratio of inertias.

    From its own start it ends at a larger inertia. "equal" has it start from our first centers, where both end alike.

    Args: patience: Seconds of a comparison after which no further one of `repeats` turns begins."""
    found = []
    given: dict[str, Any] = {"repeats": repeats, "warm": False, "patience": patience}
    for count in centers:
        points, _ = clustered(rows, dims, groups=count)
        inertia: dict[str, float] = {}

        def theirs(name: str, init: Any, points: Rows = points, count: int = count, inertia: dict[str, float] = inertia) -> None:
            start = init if isinstance(init, str) else init()
            inertia[name] = float(KMeans(count, init=start, n_init=1, random_state=0).fit(points).inertia_)

        def ours(points: Rows = points, count: int = count, inertia: dict[str, float] = inertia) -> None:
            inertia["ours"] = float(faiss.knn(points, cluster(points, count, seed=0), 1)[0].sum(dtype=np.float64))

        same = partial(theirs, "equal", partial(first_centers, points, count, seed=0))
        for number in threads:
            with allowed_threads(number), threadpool_limits(number):
                times = side_by_side(("scikit-learn", partial(theirs, "scikit-learn", "k-means++")), ("ours", ours), **given)
                equal = side_by_side(("same start", same), ("ours", ours), **given)
            ratios = {
                f"{name}_ratio": inertia["ours"] / inertia[of] for name, of in (("inertia", "scikit-learn"), ("equal", "equal"))
            }
            found.append({"centers": count, "threads": number, **times, "equal": equal, "inertia": dict(inertia), **ratios})
    settings = {"rows": rows, "dims": dims, "repeats": repeats, "patience": patience}
    return {"what": "seconds: above 1 ours is faster; inertia: below 1 ours is tighter", "settings": settings, "runs": found}


def knn(
    *, rows: int = 20_000, index_rows: int = 200_000, queries: int = 4_000, dims: int = 64, k: int = 10, repeats: int = 3
) -> dict[str, Any]:
    """scikit-learn's neighbors by brute force over the exact search, of all rows in all rows; and of more rows the seconds of
    building and asking the index, and the share of true neighbors that it finds."""
    points, _ = clustered(rows, dims, groups=10)
    reference = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute")
    theirs = partial(lambda points: reference.fit(points).kneighbors(points), points)
    ours = partial(lambda points: list(neighbors(points, points, k)), points)
    exact = side_by_side(("scikit-learn", theirs), ("ours", ours), repeats=repeats, warm=False)
    points, _ = clustered(index_rows, dims, groups=10)
    asked = points[np.sort(np.random.default_rng(0).permutation(index_rows)[:queries])]
    recall, taken = _recall(asked, points, k)
    settings = {"rows": rows, "index_rows": index_rows, "queries": queries, "dims": dims, "k": k, "repeats": repeats}
    index = {"recall": recall, "seconds": taken}
    return {"what": "seconds: above 1 ours is faster", "settings": settings, "exact": exact, "index": index}


def _recall(asked: Rows, rows: Rows, k: int) -> tuple[float, dict[str, float]]:
    """Share of the true k neighbors that the index finds, and the seconds of either search."""
    found: dict[str, NDArray[np.int64]] = {}

    def search(name: str, exact_work: float) -> None:
        found[name] = np.concatenate([near for _, _, near in neighbors(asked, rows, k, exact_work=exact_work)])

    taken = {name: seconds(partial(search, name, work)) for name, work in (("exact", np.inf), ("index", 0.0))}
    return float(np.mean([np.isin(one, other).mean() for one, other in zip(*found.values(), strict=True)])), taken


def growth(
    *,
    sizes: Sequence[int] = (10_000, 100_000, 1_000_000),
    dims: int = 32,
    names: Sequence[str] = ("spectral", "activation_clustering", "knn"),
) -> dict[str, Any]:
    """Seconds, and memory above the features', which lie in a file, of detectors on ten times as many samples each time; and the
    share of true neighbors that the index finds for 1,000 of the most."""
    found: list[dict[str, Any]] = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            table = np.lib.format.open_memmap(Path(folder) / "features.npy", "w+", np.float32, (size, dims))
            features, labels = clustered(size, dims, groups=10, out=table)
            seen = Scan(labels, np.zeros(size, np.float32), np.zeros((size, 10), np.float32), features)
            for name in names:
                before = next((one for one in reversed(found) if one["detector"] == name), None)
                taken, peak = peak_memory(partial(detectors.create(name).detect, seen))
                row = {
                    "detector": name,
                    "samples": size,
                    "seconds": taken,
                    "peak_mb": peak,
                    "features_mb": features.nbytes / 2**20,
                }
                found.append(row if before is None else {**row, "times": taken / before["seconds"]})
            recall, _ = _recall(features[:: max(1, size // 1000)][:1000], features, 15)
            del table, features, seen
    settings = {"sizes": list(sizes), "dims": dims}
    return {"what": "seconds and MB", "settings": settings, "runs": found, "recall": recall}
