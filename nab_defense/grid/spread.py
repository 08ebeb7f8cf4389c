"""Cells over a Ray cluster: whole settings in turn, so that no two workers train the same twin."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from .cells import Cell, cells_of, grouped
from .run import Tell, run_cells
from .schema import load_grid

__all__ = ["run_on_ray"]


def run_on_ray(path: Path, cells: list[Cell], out: Path, *, workers: int | None, tell: Tell) -> list[str]:
    """Run the missing cells of a grid on Ray.

    Args:
        path: The grid's file; every worker must find it, its data and `out` under these paths.
        cells: Which of its cells.
        out: Folder of the grid.
        workers: Tasks at a time on this machine; None: those of the cluster that ray.init finds.
        tell: Called with the lines of a setting when it is done.

    Returns: names of the cells that failed.

    Raises:
        ValueError: Ray is not installed."""
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise ValueError("--launcher ray needs Ray: pip install 'nab_defense[ray]'") from None
    given = {"num_cpus": workers, "include_dashboard": False} if workers else {}
    ray.init(log_to_driver=False, **given)
    try:
        task = ray.remote(_run_named)
        waiting = [
            task.remote(str(path.absolute()), [cell.name for cell in group], str(out.absolute())) for group in grouped(cells)
        ]
        failed: list[str] = []
        while waiting:
            ready, waiting = ray.wait(waiting)
            for lines, lost in ray.get(ready):
                failed += lost
                for line in lines:
                    tell(line)
        return failed
    finally:
        ray.shutdown()


def _run_named(path: str, names: list[str], out: str) -> tuple[list[str], list[str]]:
    """In a worker: run the cells of these names. Returns: what it had to tell, and the names of those that failed."""
    lines: list[str] = []
    cells = [cell for cell in cells_of(load_grid(path), path) if cell.name in set(names)]
    return lines, run_cells(cells, Path(out), tell=lines.append)
