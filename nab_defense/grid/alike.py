"""Which cells may stand in one table: all of a place made alike, and the seeds of a row."""

from __future__ import annotations

from pathlib import Path

from .. import io
from .cells import key_of
from .run import FAILED, Record

__all__ = ["check_one_setting", "mixed", "read_cells"]

CELL = {"key", "cell", "config", "status"}
SHEETS_AND_TWINS = "twins", "sheets"  # beside the cells, and none of these


def read_cells(folder: Path) -> list[Record]:
    """All cells below a folder, by file.

    Raises:
        ValueError: A file that is broken."""
    paths = [path for path in sorted(folder.rglob("*.json")) if path.parent.name not in SHEETS_AND_TWINS]
    try:
        found = [io.load_json(path) for path in paths]
    except ValueError as error:
        raise ValueError(f"{error}; delete it, and if it was a cell that is run again") from None
    return [value for value in found if isinstance(value, dict) and set(value) >= CELL]


def check_one_setting(folder: Path, records: list[Record]) -> None:
    """Refuse two cells in one place, and cells of one row that were not compared with the same two twins."""
    cells: dict[str, str] = {}
    rows: dict[str, tuple[str, str]] = {}
    for record in records:
        *row, defence = map(str, record["cell"].values())
        place, key = " ".join((*row, defence)), record["key"]
        if place in cells:
            raise ValueError(f"{folder} holds {cells[place]} and {key} for {place}: delete one, or name the grid's YAML")
        cells[place] = key
        if record["status"] == FAILED:
            continue
        setting = {name: value for name, value in record["config"].items() if name != "defence"}
        made = key_of([setting, record["twins"]])
        first, alike = rows.setdefault(" ".join(row), (key, made))
        if made != alike:
            what = f"{folder}: {first} and {key}, of {place}, have other twins: made by other settings, images or processors"
            raise ValueError(f"{what}; delete one, or name the grid's YAML")


def mixed(records: list[Record]) -> list[str]:
    """A sentence where seeds of a row ran with other settings than the seed, so that their mean is of neither; else nothing."""
    rows: dict[str, set[str]] = {}
    for record in records:
        place = record["cell"]
        row = f"{place['attack']} at {100 * place['rate']:g} % by {place['defence']} on {place['network']}"
        rows.setdefault(row, set()).add(key_of(_but_the_seed(record["config"])))
    names = [row for row, settings in rows.items() if len(settings) > 1]
    return ["**Seeds of other settings each are averaged in: " + "; ".join(names) + ".**"] if names else []


def _but_the_seed(config: Record) -> Record:
    """The configuration of a cell without the seeds of its training and its poison."""
    recipe = dict(config["recipe"])
    recipe["attack"] = recipe.get("attack") and {**recipe["attack"], "seed": None}
    return {**config, "recipe": {**recipe, "seed": None}}
