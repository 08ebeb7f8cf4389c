"""Timing: two things by turns, so that what else the machine does meets both; and the memory that one needs."""

from __future__ import annotations

import contextlib
import ctypes
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime import told_bytes

__all__ = ["peak_memory", "process_peak", "seconds", "side_by_side", "spread"]

Task = Callable[[], object]


def seconds(task: Task) -> float:
    begun = time.perf_counter()
    task()
    return time.perf_counter() - begun


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def side_by_side(
    first: tuple[str, Task], second: tuple[str, Task], *, repeats: int, warm: bool = True, patience: float = math.inf
) -> dict[str, Any]:
    """Time two tasks by turns, the order changing from turn to turn.

    Args:
        first, second: A name and a task.
        repeats: Turns.
        warm: Run both once before; what that took is told as "first_run".
        patience: Seconds after which no further turn begins.

    Returns: "seconds": name -> one value a turn; "ratio" of the first to the second, turn by turn: median and quartiles; "of":
    what it is the ratio of."""
    tasks = dict([first, second])
    told: dict[str, Any] = {"first_run": {name: seconds(task) for name, task in tasks.items()}} if warm else {}
    times: dict[str, list[float]] = {name: [] for name in tasks}
    begun = time.perf_counter()
    for turn in range(repeats):
        if turn and time.perf_counter() - begun > patience:
            break
        for name in list(tasks)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(seconds(tasks[name]))
    ratios = [one / other for one, other in zip(*times.values(), strict=True)]
    return {"of": f"{first[0]} / {second[0]}", "ratio": spread(ratios), "seconds": times, **told}


def peak_memory(task: Task) -> tuple[float, float]:
    """Seconds of a task, and MB that it had at its peak above what the process had before."""
    before = _reset_peak()
    taken = seconds(task)
    return taken, max(0.0, process_peak() - before)


def _reset_peak() -> float:
    """Give freed memory back, which would hide what a task takes, and make the present size the peak, where the system lets a
    process do so. Returns: the peak now, in MB."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):  # then the peak of an earlier task stays, and one that needs less shows 0
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return process_peak()


def process_peak() -> float:
    """MB that the process had at its peak; since the last peak_memory began, where the system can tell."""
    told = told_bytes("self/status", "VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 if told is None else told / 2**20
