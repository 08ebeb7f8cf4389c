"""nab bench as a program: a kill loses at most the running cell, ranks share the cells, Ray's workers run them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import pytest

from nab_defense import io
from nab_defense.cli import main
from nab_defense.grid import cells_of, load_grid, on_ray, own_share, run_cells
from nab_defense.grid.run import cell_path
from tests.digits_runs import ROOT
from tests.grid.small import RECIPE, small_grid

ATTACKS = {"badnets": None, "blend": None, "none": None}
TWO = {"badnets": None, "none": None}


@pytest.fixture(autouse=True)
def awake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's workers give way to every other process, and so would wait for the tests beside these."""
    monkeypatch.setenv("RAY_worker_niceness", "0")


def command(grid: Path, out: Path, *extra: str) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "bench.py"), str(grid), "--out", str(out), *extra]


def test_a_kill_loses_at_most_the_running_cell(tmp_path: Path) -> None:
    grid, out = small_grid(tmp_path, attacks=ATTACKS, seeds=[0, 1]), tmp_path / "out"
    running = subprocess.Popen(command(grid, out), stdout=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while len(list((out / "cells").glob("*.json"))) < 3 and running.poll() is None:
        assert time.monotonic() < until, "no cell was finished"
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    left = {path: path.read_bytes() for path in (out / "cells").glob("*.json")}
    assert 3 <= len(left) < 12
    assert all(io.load_json(path)["cell"]["seed"] == 0 for path in left)  # whole files, in order
    assert main(["bench", str(grid), "--out", str(out)]) == 0
    after = {path: path.read_bytes() for path in (out / "cells").glob("*.json")}
    assert len(after) == 12 and {path: after[path] for path in left} == left


def test_one_cell_and_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, out = small_grid(tmp_path, attacks=ATTACKS), tmp_path / "out"
    assert main(["bench", str(grid), "--out", str(out), "--cell", "none-0pct-oracle"]) == 0
    assert len(list((out / "cells").iterdir())) == 1
    assert main(["bench", str(grid), "--out", str(out), "--summarize"]) == 0
    page = (out / "summary" / "tables.md").read_text()
    assert "1 cells: 1 done" in page and page in capsys.readouterr().out
    assert main(["bench", str(out), "--summarize", "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "tables.md").exists()


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, out = small_grid(tmp_path), str(tmp_path / "out")
    for arguments, says in (
        ([str(tmp_path / "no.yaml")], "no such file"),
        ([str(grid), "--cell", "xyz"], "'xyz'"),
        ([str(grid), "--summarize"], "run the grid first"),
        ([str(grid), "--summarize", "--cell", "xyz"], "--cell does nothing beside --summarize"),
        (["--speed", "knn", "--summarize"], "--summarize does nothing beside --speed"),
        ([str(grid), "--summarize", "--launcher", "ray"], "--launcher ray does nothing beside --summarize"),
    ):
        assert main(["bench", *arguments, "--out", out]) == 2
        said = capsys.readouterr().err
        assert says in said and len(said.splitlines()) == 1


def test_cells_that_fail_show_in_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = {**RECIPE, "data": {**RECIPE["data"], "source": str(tmp_path / "nowhere")}}
    assert main(["bench", str(small_grid(tmp_path, recipe=nowhere)), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().out
    assert "no such folder or data set" in said and "2 cells, 2 failed" in said
    monkeypatch.setenv("RANK", "0")  # torchrun would end the other processes
    assert main(["bench", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "out")]) == 0
    assert "2 failed" in capsys.readouterr().out


def test_a_fault_of_the_program_shows_in_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("nab_defense.grid.case.train", broken)
    assert main(["bench", str(small_grid(tmp_path)), "--out", str(tmp_path / "out")]) == 1


def test_a_grid_that_is_there_was_not_made_on_another_machine(tmp_path: Path) -> None:
    """Its recipe has one thread: a fresh process, in which nothing was placed yet, would count all."""
    grid, out = small_grid(tmp_path, attacks={"none": None}), tmp_path / "out"
    for said in ("2 cells, 0 failed", "2 of 2 cells are there already\n"):
        assert said in subprocess.run(command(grid, out), capture_output=True, text=True, check=True).stdout


def test_ranks_share_whole_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = cells_of(load_grid(small_grid(tmp_path, attacks=ATTACKS)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        parts.append([cell.name for cell in own_share(cells)])
    assert sorted(parts[0] + parts[1]) == sorted(cell.name for cell in cells)
    assert [len(part) for part in parts] == [4, 2]
    assert {name.split("-")[1] for name in parts[0]} == {"badnets", "none"}


def test_two_workers_of_ray_find_what_one_process_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    grid, out, plain = small_grid(tmp_path, attacks=TWO), tmp_path / "out", tmp_path / "plain"
    assert main(["bench", str(grid), "--out", str(out), "--launcher", "ray", "--workers", "2"]) == 0
    assert "4 cells, 0 failed" in capfd.readouterr().out
    assert main(["bench", str(grid), "--out", str(plain)]) == 0
    cells = cells_of(load_grid(grid))
    for cell in cells:
        ours, theirs = (io.load_json(cell_path(folder, cell)) for folder in (out, plain))
        assert ours["figures"] == theirs["figures"] and ours["twins"] == theirs["twins"]
    assert main(["bench", str(grid), "--out", str(out), "--launcher", "ray", "--workers", "2"]) == 0
    assert "4 of 4 cells are there already" in capfd.readouterr().out


def kill_a_worker(over: Event) -> None:
    """Kill the first worker of this process's Ray that runs a task, unless all is over before there is one."""
    while not over.is_set():
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError):  # ended meanwhile
                parent = (place / "stat").read_text().rpartition(")")[2].split()[1]
                above = Path("/proc", parent, "stat").read_text().rpartition(")")[2].split()[1]
                if above == str(os.getpid()) and (place / "cmdline").read_bytes().startswith(b"ray::_in_worker"):
                    os.kill(int(place.name), signal.SIGKILL)
                    return
        time.sleep(0.05)


def test_a_worker_of_ray_that_dies_fails_its_setting(tmp_path: Path) -> None:
    grid, out, told = small_grid(tmp_path, attacks=TWO), tmp_path / "out", list[str]()
    cells, over = cells_of(load_grid(grid)), Event()
    killer = Thread(target=kill_a_worker, args=[over], daemon=True)
    killer.start()
    failed = {cell["key"] for cell in run_cells(cells, out, tell=told.append, runner=on_ray(1))}
    over.set()
    killer.join()
    lost = [cell for cell in cells if cell.key in failed]
    assert len(told) == 4 and lost and len({cell.setting.attack for cell in lost}) == 1
    assert all("its worker died" in io.load_json(cell_path(out, cell))["error"] for cell in lost)
    assert main(["bench", str(grid), "--out", str(out)]) == 0
    assert {io.load_json(cell_path(out, cell))["status"] for cell in cells} == {"done", "attack failed"}


def test_ray_says_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    grid, out = str(small_grid(tmp_path)), str(tmp_path / "out")
    assert main(["bench", grid, "--out", out, "--workers", "2"]) == 2
    assert "with --launcher ray" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["bench", grid, "--out", out, "--launcher", "ray"]) == 2
    assert "pip install ray, or this package with its extra [ray]" in capsys.readouterr().err
