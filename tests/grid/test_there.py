"""What the cells that are there already spare a grid."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from nab_defense import io
from nab_defense.grid import cells_of, load_grid, run_cells
from nab_defense.grid import run as running
from nab_defense.grid.run import cell_path
from tests.grid.small import small_grid


def run(grid: Path, out: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Records by row of the grid, and the lines that were told."""
    cells, told = cells_of(load_grid(grid)), []
    run_cells(cells, out, tell=told.append)
    return {cell.defence: io.load_json(cell_path(out, cell)) for cell in cells}, told


def test_where_an_attack_is_known_to_fail_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, out = small_grid(tmp_path, defences={"none": None, "oracle": None, "nab": None, "abl": None}), tmp_path / "out"
    found, _ = run(grid, out)
    assert found["none"]["status"] == "attack failed"  # one epoch
    paths = {cell.defence: cell_path(out, cell) for cell in cells_of(load_grid(grid))}
    paths["nab"].unlink()
    paths["abl"].unlink()
    monkeypatch.setattr(running, "records", lambda cells, out: pytest.fail("run") if cells else iter(()))
    again, told = run(grid, out)
    for name in ("nab", "abl"):  # what the other says of the twins, and not of code that never ran this one
        shared = {key: found[name][key] for key in ("key", "cell", "config", "status", "twins", "plain_seconds")}
        assert again[name] == {**shared, "told_by": found["none"]["key"], "wall_seconds": 0.0}
    assert told == ["2 of 4 cells are there already; the attack of 2 more has failed, as they tell"]


def test_cells_that_contradict_each_other_tell_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, out = small_grid(tmp_path, defences={"none": None, "oracle": None, "nab": None, "abl": None}), tmp_path / "out"
    found, _ = run(grid, out)
    paths = {cell.defence: cell_path(out, cell) for cell in cells_of(load_grid(grid))}
    monkeypatch.setattr(running, "records", lambda cells, out: pytest.fail("run") if cells else iter(()))
    paths["nab"].unlink()
    for other in ({"twins": {}}, {"status": "done"}):  # of other images, say
        io.save_json(paths["abl"], {**found["abl"], **other})
        with pytest.raises(pytest.fail.Exception, match="run"):
            run(grid, out)
    io.save_json(paths["abl"], found["abl"])
    paths["oracle"].unlink()  # has figures of its own
    with pytest.raises(pytest.fail.Exception, match="run"):
        run(grid, out)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_file_that_holds_no_cell_is_named(tmp_path: Path, text: str) -> None:
    (cell, *_) = cells_of(load_grid(small_grid(tmp_path)))
    path = cell_path(tmp_path / "out", cell)
    io.save_text(path, text)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*; delete it, and its cell is run again"):
        run_cells([cell], tmp_path / "out", tell=print)
