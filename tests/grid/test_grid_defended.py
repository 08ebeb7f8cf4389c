"""A small grid whose defences find the poison: what is reported is what they trained."""

from __future__ import annotations

from typing import Any

import pytest

from nab_defense import io
from nab_defense.defences import Outcome
from nab_defense.grid import cells_of, load_grid, run_cells
from nab_defense.grid import run as running
from nab_defense.grid.case import Case
from nab_defense.grid.figures import figures
from nab_defense.grid.run import cell_path
from tests.digits_runs import BLEND, TINY
from tests.grid.small import small_grid

# With these lengths the scan finds all of the poison, and most of it is named right, with each of six seeds.
CHANGES: dict[str, dict[str, Any]] = {
    "data": {"limit": 400, "test_limit": 200},
    "scan": {"epochs": 10},
    "relabel": {"params": {"epochs": 10}},
    "train": {"epochs": 12},
    "runtime": {"precision": "float32"},
}
RECIPE = {key: {**TINY[key], **BLEND.get(key, {}), **changed} for key, changed in CHANGES.items()}
Ran = dict[str, tuple[dict[str, Any], Outcome, Case]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Record, outcome and case of each row."""
    folder, outcomes = tmp_path_factory.mktemp("grid"), list[tuple[Outcome, Case]]()

    def spy(outcome: Outcome, case: Case, **how: bool) -> dict[str, Any]:
        outcomes.append((outcome, case))
        return figures(outcome, case, **how)

    rows = {"attacks": {"blend": {"params": {"alpha": 0.3}}}, "defences": {"nab": None, "drop": None}, "seeds": [4]}
    grid = small_grid(folder, recipe=RECIPE, networks={"resnet": {"model": {**TINY["model"], **BLEND["model"]}}}, **rows)
    cells = cells_of(load_grid(grid))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "figures", spy)
        run_cells(cells, folder / "out", tell=lambda line: None)
    records = [io.load_json(cell_path(folder / "out", cell)) for cell in cells]
    return {cell.defence: (record, *found) for cell, record, found in zip(cells, records, outcomes, strict=True)}


@pytest.mark.parametrize("defence", ["nab", "drop"])
def test_what_is_found_is_not_obeyed(defence: str, ran: Ran) -> None:
    record, outcome, case = ran[defence]
    measured, before = record["figures"], record["twins"]["undefended"]["asr"]["value"]
    assert record["status"] == "done" and before > 0.9
    assert measured["defended"]["asr"]["value"] < before - 0.5 and measured["der"]["value"] > 0.6
    assert measured["altered"]["value"] > 0.1
    assert measured["detection"]["recall"]["value"] > 0.5 and measured["detection"]["precision"]["value"] > 0.5
    assert outcome.plan is not None and (outcome.plan.suspect & case.truth.poisoned).any()
    assert record["seconds"].keys() == {"scan", "train"} and min(record["seconds"].values()) > 0


def test_drop_keeps_no_suspect_and_everything_else(ran: Ran) -> None:
    plan = ran["drop"][1].plan
    assert plan is not None and plan.suspect.any()
    assert (plan.keep == ~plan.suspect).all() and (plan.changed == plan.suspect).all()


def test_nab_relabels_under_its_stamp(ran: Ran) -> None:
    record, outcome, _ = ran["nab"]
    assert outcome.plan is not None and (outcome.plan.suspect & outcome.plan.altered & outcome.plan.keep).any()
    assert record["figures"]["relabel_accuracy"]["value"] > 0.5
    assert record["figures"]["plain"] is not None and record["figures"]["rejects"] is not None
