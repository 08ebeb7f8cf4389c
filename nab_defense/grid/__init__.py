"""The benchmark: attacks x rates x defences x networks x seeds from one YAML, and what came of it."""

from .cells import Cell, cells_of, find_cells
from .launch import on_ray, own_share
from .plots import draw
from .run import run_cells
from .schema import Grid, load_grid
from .tables import markdown, read_results

__all__ = [
    "Cell", "Grid", "cells_of", "draw", "find_cells", "load_grid", "markdown", "on_ray", "own_share", "read_results",
    "run_cells",
]  # fmt: skip
