"""Running a grid: paired twins, cells that stay, failures that are written down, and figures that repeat."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nab_defense import io
from nab_defense.bench.attacks.badnets import BadNets
from nab_defense.bench.attacks.blend import Blend
from nab_defense.defences import Outcome, Task
from nab_defense.detectors.knn import KNN
from nab_defense.grid import cells_of, find_cells, load_grid, run_cells
from nab_defense.grid import figures as judged
from nab_defense.grid import run as running
from nab_defense.grid.case import Case
from nab_defense.grid.run import cell_path
from nab_defense.purify.ibau import IBAU
from nab_defense.result import short
from tests.grid.small import RECIPE, small_grid

TIMES = ("seconds", "relative_seconds", "plain_seconds", "wall_seconds", "commit")


def run(grid: Path, out: Path, cell: str | None = None) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Records by row of the grid, and the lines that were told."""
    cells, told = cells_of(load_grid(grid)), []
    chosen = cells if cell is None else find_cells(cells, cell)
    run_cells(chosen, out, tell=told.append)
    return {c.defence: io.load_json(cell_path(out, c)) for c in chosen}, told


def lasting(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMES}


@pytest.fixture
def obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every attack for one that works, so that defences run after one epoch."""
    monkeypatch.setattr(judged, "WORKS", 0.0)


def test_cells_share_their_twins_and_are_run_once(
    tmp_path: Path, obeyed: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    defences = {"none": None, "oracle": None, "drop": None, "abl": {"params": {"steps": 2}}}
    grid = small_grid(tmp_path, defences=defences)
    found, told = run(grid, tmp_path / "out")
    assert len(told) == 4 and told[0].startswith("1/4 resnet-badnets-20pct-none-seed0")
    twins = [record["twins"] for record in found.values()]
    assert all(twin == twins[0] for twin in twins)
    assert found["none"]["figures"]["defended"] == twins[0]["undefended"]
    assert found["oracle"]["figures"]["defended"] == twins[0]["oracle"]
    for name in ("excess_asr", "acc_gap"):
        figure = found["oracle"]["figures"][name]
        assert figure["value"] == 0 and figure["low"] < 0 < figure["high"] and figure["n"] > 0
    der = found["oracle"]["figures"]["der"]
    assert der["low"] < der["value"] < der["high"] and der["n"] > 0
    assert found["none"]["figures"]["der_ceiling"] == (twins[0]["undefended"]["asr"]["value"] + 1) / 2
    assert found["none"]["figures"]["der"]["value"] == 0.5
    assert found["oracle"]["figures"]["altered"]["value"] == 0.2 and found["none"]["figures"]["poisoned"] == 40
    assert found["abl"]["figures"]["altered"]["value"] == 0.01 and found["abl"]["figures"]["rejects"] is None
    assert found["none"]["relative_seconds"] == {"train": 1, "total": 1}
    assert all(made.keys() == {"commit", "hardware"} for made in found["abl"]["twins_made"].values())
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")}
    (sheet,), (record,) = ((tmp_path / "out").glob(kind) for kind in ("sheets/*", "twins/resnet-*.json"))
    assert sheet.stem == record.stem and sheet.suffix == ".png"
    _, told = run(grid, tmp_path / "out")
    assert told == ["4 of 4 cells are there already"]
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*")}
    monkeypatch.setattr("nab_defense.grid.run.commit", lambda: "another")
    made = short(found["none"]["commit"])
    _, told = run(grid, tmp_path / "out")
    mend = "delete these and twins/ to run them anew"
    assert told == [f"4 of 4 cells are there already; 4 of them by other code, commit {made}: {mend}"]
    monkeypatch.setattr("nab_defense.runtime.Runtime.hardware", lambda self: "a slide rule")
    machine = found["none"]["hardware"]
    _, told = run(grid, tmp_path / "out")
    assert told[0].endswith(f"commit {made}; 4 of them on another machine, {machine}: {mend}")
    with caplog.at_level("WARNING"):
        run(grid, tmp_path / "out", cell="-none-")  # is there
        assert not caplog.records
        for path in (tmp_path / "out" / "cells").glob("*-none-*"):
            path.unlink()
        run(grid, tmp_path / "out", cell="-none-")
    assert f"another hardware trained it, {machine}, and this is a slide rule" in caplog.text
    stale = {"undefended": {"acc": {"value": 0.1}, "asr": {"value": 0.0}}, "oracle": {}, "weights": ["of others", "of others"]}
    io.save_json(record, stale)  # as where the weights alone were deleted, and trained by another processor
    for path in (tmp_path / "out" / "cells").glob("*-none-*"):
        path.unlink()
    again, _ = run(grid, tmp_path / "out", cell="-none-")
    assert again["none"]["twins"] == found["none"]["twins"] and again["none"]["status"] == found["none"]["status"]


def test_a_cell_alone_and_from_scratch_gives_the_same_figures(tmp_path: Path, obeyed: None) -> None:
    paper = {name: {"defence": "nab_paper", "params": {"labels": name}} for name in ("trusted", "recipe")}
    defences = {name: None for name in ("none", "oracle", "nab", "drop", "dbr")} | paper
    grid = small_grid(tmp_path, defences=defences)
    whole, _ = run(grid, tmp_path / "whole")
    for name in ("nab", "drop", "dbr", *paper):  # drop takes up nab's look where all run
        alone, _ = run(grid, tmp_path / f"alone_{name}", cell=f"-{name}-")
        assert lasting(alone[name]) == lasting(whole[name])
    figures = {name: record["figures"] for name, record in whole.items()}
    assert figures["recipe"]["plain"] is not None and set(figures["recipe"]["rejects"]) == {"clean", "triggered"}
    assert figures["trusted"]["detection"] == figures["recipe"]["detection"]  # the same suspects, under other names
    assert figures["dbr"]["detection"]["selected"] == 10 and figures["dbr"]["altered"]["value"] == 0.05


def test_a_repair_that_stops_is_not_repaired_and_no_failure(tmp_path: Path, obeyed: None) -> None:
    row = {"defence": "purify", "params": {"method": "finetune", "settings": {"lr": 1e38, "steps": 9, "rounds": 1}}}
    found, _ = run(small_grid(tmp_path, clean=100, defences={"diverged": row}), tmp_path / "out")
    record = found["diverged"]
    assert record["status"] == "done" and record["figures"]["altered"] is None  # it goes over no samples
    stopped = r"finetune: the loss is (?:nan|inf) in step \d; lower lr, or give other clean images"
    told = re.fullmatch(rf"rejected: {stopped}: universal perturbations turned (\d\.\d\d), then \1", record["note"])
    assert told is not None and 0.5 <= float(told[1]) <= 1  # a network of one epoch names hardly more than one class
    assert record["figures"]["defended"] == record["twins"]["undefended"]


def test_a_failing_cell_is_written_down_and_the_others_go_on(tmp_path: Path, obeyed: None) -> None:
    rows = {"bad": {"defence": "purify", "params": {"method": "distill"}}, "none": None}
    found, told = run(small_grid(tmp_path, defences=rows), tmp_path / "out")
    assert found["bad"]["status"] == "failed" and "needs 100" in found["bad"]["error"] and "figures" not in found["bad"]
    assert not found["bad"]["fault"]
    assert found["none"]["status"] == "done" and "failed" in told[0]
    _, told = run(small_grid(tmp_path, defences=rows), tmp_path / "out")
    assert told[0] == "1 of 2 cells are there already" and "failed" in told[1] and len(told) == 2  # tried again
    found, _ = run(small_grid(tmp_path, attacks={"sig": None}, rates=[0.5]), tmp_path / "sig")
    assert {record["status"] for record in found.values()} == {"failed"} and "largest possible" in found["none"]["error"]


def test_a_setting_that_cannot_be_made_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse(case: Case, plan: object, arm: str, *, kept: bool) -> None:
        tried.append(arm)
        assert not kept  # nobody resumes it
        raise ValueError("the loss is nan")

    monkeypatch.setattr("nab_defense.grid.case.train", refuse)
    found, _ = run(small_grid(tmp_path, defences={"none": None, "oracle": None, "drop": None}), tmp_path / "out")
    assert [record["error"] for record in found.values()] == ["the loss is nan"] * 3 and tried == ["twin"]


def test_a_fault_of_the_program_is_written_down_too(
    tmp_path: Path, obeyed: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: object, task: object) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("nab_defense.defences.drop.Drop.defend", broken)
    found, _ = run(small_grid(tmp_path, defences={"drop": None, "none": None}), tmp_path / "out")
    assert found["drop"]["status"] == "failed" and found["drop"]["error"] == "RuntimeError: out of memory"
    assert found["drop"]["fault"] and "Traceback" in found["drop"]["trace"] and found["drop"]["trace"] in caplog.text
    assert found["none"]["status"] == "done"


def test_another_default_is_another_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"paper": {"defence": "nab_paper", "params": {"detector": "knn"}}, "fix": {"defence": "purify"}, "oracle": None}
    rows["ours"] = {"defence": "nab", "recipe": {"scan": {"detector": "knn"}}}
    grid = load_grid(small_grid(tmp_path, attacks={"blend": None}, defences=rows))

    def keys() -> list[str]:
        return [cell.key for cell in cells_of(grid)]

    before = keys()
    assert keys() == before
    monkeypatch.setattr(KNN, "__init__", lambda self, neighbors=7: None)
    assert [new == old for new, old in zip(keys(), before, strict=True)] == [False, True, True, False]
    monkeypatch.setattr(IBAU, "__init__", lambda self, steps=7: None)
    assert [new == old for new, old in zip(keys(), before, strict=True)] == [False, False, True, False]
    monkeypatch.setattr(Blend, "__init__", lambda self, alpha=0.5: None)
    assert not set(keys()) & set(before)


@pytest.mark.parametrize("attack", ["stamp_aware", "tact", "several"])
def test_so_is_that_of_an_attack_within_an_attack(attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = load_grid(small_grid(tmp_path, attacks={attack: None}))
    before = [cell.key for cell in cells_of(grid)]
    assert [cell.key for cell in cells_of(grid)] == before
    monkeypatch.setattr(BadNets, "__init__", lambda self: vars(self).update(size=7, corner="top_left", margin=1, pattern="white"))
    assert not {cell.key for cell in cells_of(grid)} & set(before)


def test_another_picture_under_the_same_name_is_another_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    grid = load_grid(small_grid(tmp_path, attacks={"blend": {"params": {"trigger": "mine.png"}}, "several": None}))
    keys = []
    for shade in (0, 255):
        io.save_image(tmp_path / "mine.png", Image.new("RGB", (8, 8), (shade,) * 3))
        (tmp_path / "badnets").write_text(str(shade))  # no picture: an attack has that name
        keys.append({cell.setting.attack: cell.setting.key for cell in cells_of(grid)})
    assert keys[0]["blend"] != keys[1]["blend"] and keys[0]["several"] == keys[1]["several"]


def test_twins_are_those_of_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell, _) = cells_of(load_grid(small_grid(tmp_path)))
    kept = Case(cell.setting, tmp_path, tmp_path / "a").twins.figures
    assert Case(cell.setting, tmp_path, tmp_path / "b").twins.figures == kept
    assert len(list((tmp_path / "twins").glob("resnet-badnets-*.safetensors"))) == 1
    monkeypatch.setattr(BadNets, "apply", lambda self, images, seed: 255 - images)  # the attack's code changes
    assert Case(cell.setting, tmp_path, tmp_path / "c").twins.figures != kept
    assert len(list((tmp_path / "twins").glob("resnet-badnets-*.safetensors"))) == 2


def test_a_shared_scan_is_one_of_the_same_settings(tmp_path: Path) -> None:
    rows = {"none": None, "longer": {"defence": "none", "recipe": {"scan": {"epochs": 3}}}}
    first, second = cells_of(load_grid(small_grid(tmp_path, defences=rows)))
    case = Case(first.setting, tmp_path, tmp_path / "work")
    tasks = [case.task(cell, tmp_path) for cell in (first, second)]
    assert [task.remember("look", lambda task=task: task.recipe.scan.epochs)[0] for task in (*tasks, *tasks)] == [
        tasks[0].recipe.scan.epochs, 3, tasks[0].recipe.scan.epochs, 3,
    ]  # fmt: skip


def test_where_the_attack_fails_nothing_is_defended(tmp_path: Path) -> None:
    found, _ = run(small_grid(tmp_path, defences={"none": None, "nab": None}), tmp_path / "out")
    assert found["none"]["twins"]["undefended"]["asr"]["value"] < 0.7  # one epoch
    assert {record["status"] for record in found.values()} == {"attack failed"}
    assert "figures" in found["none"] and "figures" not in found["nab"]


def test_harmless_data_has_no_asr_and_one_twin(tmp_path: Path) -> None:
    found, _ = run(small_grid(tmp_path, attacks={"none": None}, defences={"none": None, "drop": None}), tmp_path / "out")
    figures = found["drop"]["figures"]
    assert found["drop"]["status"] == "done" and "asr" not in figures["defended"]
    assert figures["excess_asr"] is figures["der"] is figures["detection"]["auroc"] is None
    assert found["none"]["twins"]["undefended"] == found["none"]["twins"]["oracle"]
    assert len(list((tmp_path / "out" / "twins").glob("*.safetensors"))) == 1


def test_attacks_that_poison_the_same_images_have_one_oracle(tmp_path: Path) -> None:
    grid = small_grid(tmp_path, attacks={"badnets": None, "blend": None, "sig": {"rates": [0.05]}}, defences={"oracle": None})
    cells = cells_of(load_grid(grid))
    cases = [Case(cell.setting, tmp_path, tmp_path / str(i)) for i, cell in enumerate(cells)]
    keys = [case._kept_key() for case in cases]
    assert keys[0] == keys[1] != keys[2]
    assert not np.array_equal(cases[0].given.pixels(int(cases[0].truth.poisoned.argmax())), cases[1].given.pixels(
        int(cases[0].truth.poisoned.argmax())))  # fmt: skip


def test_trusted_images_are_neither_trained_on_nor_tested(tmp_path: Path) -> None:
    grid = small_grid(tmp_path, recipe={**RECIPE, "data": {"source": "digits", "test": "digits"}})
    (cell, _) = cells_of(load_grid(grid))
    case = Case(cell.setting, tmp_path, tmp_path / "work")
    images = [
        {part.pixels(i).tobytes() for i in range(len(part))} for part in (case.given, case.trusted, case.session.test_source)
    ]
    assert len(case.trusted) == 40 and len(case.given) + 40 == 1438
    assert not images[1] & images[0] and not images[1] & images[2]


def test_seconds_are_told_beside_ordinary_training(tmp_path: Path, obeyed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(defence: object, task: Task) -> Outcome:
        return Outcome(task.undefended, {"scan": 3.0, "train": 5.0})

    monkeypatch.setattr("nab_defense.defences.drop.Drop.defend", slow)
    cells = cells_of(load_grid(small_grid(tmp_path, defences={"drop": None, "oracle": None})))
    case = Case(cells[0].setting, tmp_path, tmp_path / "work")
    kept = {"undefended": 4.0, "oracle": 10.0}
    monkeypatch.setitem(vars(case), "twins", dataclasses.replace(case.twins, seconds=kept))
    drop, oracle = (running._run(cell, case, tmp_path / cell.defence) for cell in cells)
    assert drop["plain_seconds"] == oracle["plain_seconds"] == case.task(cells[0], tmp_path).plain_seconds == 4
    assert drop["seconds"] == {"scan": 3, "train": 5} and oracle["seconds"] == {"train": 10}
    assert drop["relative_seconds"] == {"scan": 0.75, "train": 1.25, "total": 2}
    assert oracle["relative_seconds"] == {"train": 2.5, "total": 2.5}
    assert drop["figures"]["altered"] is None  # it says nothing of samples
