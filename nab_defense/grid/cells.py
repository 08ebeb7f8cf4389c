"""The cells of a grid: what each is, what it is called, and in which order they run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from .. import io
from ..bench.attacks import attacks
from ..bench.attacks.base import PATTERN
from ..defences import defences
from ..detectors import detectors
from ..methods import check_methods
from ..relabel import relabelers
from ..runtime import Runtime
from ..schema import Recipe
from .schema import NONE, ORACLE, AttackRow, DefenceRow, Grid, merged, network_recipe

__all__ = ["Cell", "Setting", "cells_of", "defended_recipe", "find_cells", "grouped", "key_of"]

VERSION = version("nab_defense")
# The poison is drawn with a seed far from the recipe's, from which a defence draws too: it could not guess by chance.
POISON_SEED = 1_000_003


def key_of(value: Any) -> str:
    """A short name for a JSON-able value: the same for the same content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]


@dataclass(frozen=True, eq=False)
class Setting:
    """One poisoned training set and one start: what all defences of a row are compared on.

    Args:
        recipe: With the attack, the test set and the seed.
        clean: How many images are held out of the source and trusted.
        network, attack, rate, seed: Names of its place in the grid; rate 0 where nothing is poisoned.
    """

    recipe: Recipe
    clean: int
    network: str
    attack: str
    rate: float
    seed: int

    @cached_property
    def config(self) -> dict[str, Any]:
        """Everything that determines it, and the defaults of what is left out: a cell must not stand for another default."""
        recipe = self.recipe
        defaults = method_defaults(recipe)
        if recipe.attack is not None:
            defaults["attack"] = attacks.all_defaults(recipe.attack.name, **recipe.attack.params)
        return {
            "recipe": recipe.model_dump(mode="json", exclude={"name"}),
            "clean": self.clean,
            "package": VERSION,
            "defaults": defaults,
            **({"files": files} if (files := _files(recipe.attack and recipe.attack.params)) else {}),
        }

    @cached_property
    def key(self) -> str:
        return key_of(self.config)

    @cached_property
    def hardware(self) -> str:
        """What its cells would run on here; "" where they cannot, for want of a GPU, say."""
        try:
            return Runtime(**self.recipe.runtime.model_dump(), seed=self.recipe.seed).hardware()
        except ValueError:
            return ""

    @property
    def name(self) -> str:
        return f"{self.network}-{self.attack}-{100 * self.rate:g}pct-seed{self.seed}"


@dataclass(frozen=True, eq=False)
class Cell:
    """One defence in one setting."""

    setting: Setting
    defence: str
    row: DefenceRow

    @property
    def kind(self) -> str:
        """The registered name of its defence."""
        return self.row.defence or self.defence

    @cached_property
    def config(self) -> dict[str, Any]:
        row = self.row
        defaults: dict[str, Any] = {} if self.kind == ORACLE else defences.all_defaults(self.kind, **row.params)
        if row.recipe:
            defaults = {**defaults, "recipe": method_defaults(defended_recipe(self))}
        given = {"name": self.kind, "params": row.params, "recipe": row.recipe, "defaults": defaults}
        return {**self.setting.config, "defence": given}

    @cached_property
    def key(self) -> str:
        return key_of(self.config)

    @property
    def name(self) -> str:
        """Readable, and unlike every other cell's; the name of its file."""
        setting = self.setting
        place = f"{setting.network}-{setting.attack}-{100 * setting.rate:g}pct-{self.defence}-seed{setting.seed}"
        return f"{place}-{self.key}"


def cells_of(grid: Grid, origin: str = "grid") -> list[Cell]:
    """All cells in the order in which they run: seed 0 of everything comes first, and in it the highest rates.

    Raises:
        ValueError: Settings that no cell could use; found before anything is trained."""
    rows = [(name, row or DefenceRow()) for name, row in grid.defences.items()]
    cells = [Cell(setting, name, row) for setting in _settings(grid, origin) for name, row in rows]
    names: dict[str, Cell] = {}
    for cell in cells:
        if cell.name in names:
            raise ValueError(f"{origin}: the cell {cell.name} is there twice; drop one of its rates, seeds or rows")
        names[cell.name] = cell
    return cells


def _settings(grid: Grid, origin: str) -> Iterator[Setting]:
    attacks = {name: row or AttackRow() for name, row in grid.attacks.items()}
    most = max(len(row.rates or grid.rates) for row in attacks.values())
    for seed in grid.seeds:
        for place in range(most):
            for network in grid.networks:
                for name, row in attacks.items():
                    rates = (0.0,) if (row.name or name) == NONE else row.rates or grid.rates
                    if place < len(rates):
                        yield _setting(grid, origin, network, name, row, rates[place], seed)


def _setting(grid: Grid, origin: str, network: str, name: str, row: AttackRow, rate: float, seed: int) -> Setting:
    attack: Any = None
    if rate:
        goal = {"target": row.target, "mode": row.mode, "seed": POISON_SEED + seed}
        attack = {"name": row.name or name, "rate": rate, "params": row.params, **goal}
    recipe = network_recipe(grid, network, origin=origin, attack=attack, seed=seed)
    try:
        check_methods(recipe)
        if recipe.data.test is None:
            raise ValueError("data.test is missing: there is nothing to measure on")
        if recipe.data.truth is not None:
            raise ValueError("data.truth cannot be used: the grid poisons by itself")
    except ValueError as error:
        raise ValueError(f"{origin}: attacks.{name} with networks.{network}: {error}") from None
    return Setting(recipe, grid.clean, network, name, rate, seed)


def _files(params: Any) -> dict[str, str]:
    """Path -> hash of all files that an attack's settings name."""
    if isinstance(params, str):
        if params == PATTERN or params in attacks.names():
            return {}
        with suppress(OSError, RuntimeError):  # no name of a file, or not one that can be read: the attack says so itself
            return {params: io.file_hash(Path(params).expanduser())}
        return {}
    inner = params.values() if isinstance(params, dict) else params if isinstance(params, (list, tuple)) else ()
    return {name: made for part in inner for name, made in _files(part).items()}


def method_defaults(recipe: Recipe) -> dict[str, Any]:
    """The settings that the recipe's detector and relabeler have where it names none."""
    return {"detector": detectors.defaults(recipe.scan.detector), "relabeler": relabelers.defaults(recipe.relabel.name)}


def defended_recipe(cell: Cell) -> Recipe:
    """What the cell's defence is told: no attack, no truth, no test set, and not where the images came from, which would
    lead to all of these."""
    tree = cell.setting.recipe.model_dump(mode="json")
    tree["data"] |= {"source": "given", "test": None, "limit": None, "test_limit": None, "truth": None, "options": {}}
    tree |= {"name": "defence", "attack": None, "baselines": []}
    return Recipe.model_validate(merged(tree, cell.row.recipe))


def find_cells(cells: list[Cell], part: str) -> list[Cell]:
    """The one cell whose name or key holds this part.

    Raises:
        ValueError: None, or several."""
    found = [cell for cell in cells if part in cell.name]
    if len(found) == 1:
        return found
    if not found:
        raise ValueError(f"no cell of this grid has {part!r} in its name; the first is {cells[0].name}")
    raise ValueError(f"{len(found)} cells have {part!r} in their names, e.g. {found[0].name} and {found[1].name}; give more")


def grouped(cells: list[Cell]) -> list[list[Cell]]:
    """Cells of one setting together, in their order."""
    return [list(group) for _, group in groupby(cells, key=lambda cell: id(cell.setting))]
