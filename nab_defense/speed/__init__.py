"""Speed: what the parts cost, each side by side with what it replaces or wraps, in one process."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from .. import io
from ..registry import nearest
from ..result import provenance
from ..runtime import Runtime
from .fitting import compiled, defended, training, training_224, wrapper
from .running import ranks, scan_growth, whole
from .scanning import purify, scan
from .vectors import growth, kmeans, knn

__all__ = ["BENCHMARKS", "run_speed"]

log = logging.getLogger(__name__)

BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "training": training, "training_224": training_224, "wrapper": wrapper, "defended": defended, "scan": scan,
    "kmeans": kmeans, "knn": knn, "growth": growth, "purify": purify, "compile": compiled, "ranks": ranks,
    "scan_growth": scan_growth, "whole": whole,
}  # fmt: skip


def run_speed(out: Path, only: Sequence[str] = (), **knobs: Any) -> dict[str, dict[str, Any]]:
    """Run benchmarks and write each to speed_<name>.json as soon as it is done.

    Args:
        out: Folder; created.
        only: Names of BENCHMARKS; none: all.
        knobs: Settings of those that are named, such as repeats, in place of their defaults.

    Returns: name -> what was written: "settings" and what the benchmark measured, with commit, hardware, versions and the load of
    the machine before and after, since another program on the same cores shifts every figure.

    Raises:
        ValueError: No such benchmark or setting, a folder that cannot be written, or several ranks."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--speed has the machine to itself; start it without torchrun (its part 'ranks' starts two by itself)")
    for name in only:
        if name not in BENCHMARKS:
            raise ValueError(f"no benchmark {name!r}; known: {', '.join(BENCHMARKS)}{nearest(name, BENCHMARKS)}")
    for name in only or BENCHMARKS:
        known = signature(BENCHMARKS[name]).parameters
        for key in knobs:
            if key not in known:
                raise ValueError(f"benchmark {name!r} has no setting {key!r}; known: {', '.join(known)}{nearest(key, known)}")
    io.check_folder(out)
    results = {}
    for name in only or BENCHMARKS:
        log.info("%s", name)
        before = _load()
        measured = BENCHMARKS[name](**knobs)
        result = {"name": name, **measured, **provenance(Runtime(device="cpu")), "load": [before, _load()]}
        io.save_json(out / f"speed_{name}.json", result)
        results[name] = result
    return results


def _load() -> float | None:
    """Mean number of running processes in the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
