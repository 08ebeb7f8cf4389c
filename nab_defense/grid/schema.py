"""What a grid may say, and reading it from YAML as strictly as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from .. import io
from ..checkpoint import Network
from ..defences import defences
from ..methods import check_methods
from ..recipe import parse_recipe
from ..registry import nearest
from ..schema import Fraction, Positive, Recipe, Section, Settings

__all__ = ["NONE", "ORACLE", "AttackRow", "DefenceRow", "Grid", "load_grid", "merged", "network_recipe"]

NONE, ORACLE = "none", "oracle"
OWN = ("scan", "fraction", "relabel", "stamp")  # of a recipe: what the undefended twin does not depend on
FILLED = ("name", "seed", "attack", "baselines", "purify")  # of a recipe: what the grid sets for each cell, or leaves out


class AttackRow(Section):
    """An attack of the grid, under a name of its own.

    Args:
        name: The attack; None: what the row is called. "none" is harmless data.
        target, mode, params: As in a recipe.
        rates: In place of the grid's: an attack on one class cannot poison more than that class holds.
    """

    name: str | None = None
    target: int = Field(0, ge=0)
    mode: Literal["all_to_one", "all_to_all"] = "all_to_one"
    rates: tuple[Fraction, ...] | None = None
    params: Settings = Field(default_factory=dict)


class DefenceRow(Section):
    """A defence of the grid, under a name of its own.

    Args:
        defence: One of `defences`, or "oracle"; None: what the row is called.
        params: Its settings.
        recipe: Sections of the recipe that it replaces in part; those that defences alone read.
    """

    defence: str | None = None
    params: Settings = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict)


class Grid(Section):
    """Attacks x rates x defences x networks x seeds.

    Args:
        name: Names the folder of results.
        recipe: What all cells share: data, schedule, scan, runtime. `data.limit` counts the images to train on.
        clean: Images that are held out of the source before it is poisoned, and trusted; for defences that need some.
        networks: Name -> sections of the recipe that make the network: `model`, and its own `train` or `scan`.
        attacks, rates, defences, seeds: The other sides of the grid.
    """

    name: str
    recipe: dict[str, Any]
    clean: Positive
    networks: dict[str, dict[str, Any]] = Field(min_length=1)
    attacks: dict[str, AttackRow | None] = Field(min_length=1)
    rates: tuple[Fraction, ...] = Field(min_length=1)
    defences: dict[str, DefenceRow | None] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)


def load_grid(path: str | Path) -> Grid:
    """Read a grid.

    Raises:
        ValueError: One line that names the key, what is allowed and the nearest right spelling."""
    path = Path(path)
    tree = io.load_yaml(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds {type(tree).__name__}, expected keys such as recipe, attacks, defences")
    try:
        grid = Grid.model_validate({"name": path.stem, **tree})
    except ValidationError as error:
        raise ValueError(f"{path}: {_first(error)}") from None
    for key in FILLED:
        if key in grid.recipe:
            raise ValueError(f"{path}: recipe.{key} cannot be set, the grid fills it in; drop it")
    for name, row in grid.defences.items():
        row = row or DefenceRow()
        _check_defence(f"{path}: defences.{name}", row.defence or name, row)
    for network, sections in grid.networks.items():
        for key in FILLED:
            if key in sections:
                raise ValueError(f"{path}: networks.{network}.{key} cannot be set, the grid fills it in; drop it")
        model = network_recipe(grid, network, origin=str(path)).model
        try:
            Network(model.name, 2).check_name()
        except ValueError as error:
            raise ValueError(f"{path}: networks.{network}: {error}") from None
        for name, row in grid.defences.items():
            if row and row.recipe:
                _check_sections(grid, network, f"{path}: defences.{name}", row.recipe)
    for name, attack in grid.attacks.items():
        if attack and attack.mode == "all_to_all" and "target" in attack.model_fields_set:
            raise ValueError(f"{path}: attacks.{name} has mode all_to_all, where target does nothing; drop it")
        if attack and (attack.name or name) == NONE and (attack.params or attack.rates):
            raise ValueError(f"{path}: attacks.{name} poisons nothing, and has neither rates nor params; drop them")
    return grid


def network_recipe(grid: Grid, network: str, *, origin: str, **sections: Any) -> Recipe:
    """The recipe of all cells with this network; `sections` replace parts of it.

    Raises:
        ValueError: A setting that a recipe does not have."""
    tree = grid.recipe
    for part in (grid.networks[network], sections):
        tree = merged(tree, part)
    recipe = parse_recipe({"name": grid.name, **tree}, (), f"{origin}: recipe with networks.{network}")
    if recipe.relabel.trusted is not None:
        raise ValueError(f"{origin}: relabel.trusted cannot be set, as it may hold the test images or the truth; drop it")
    return recipe


def merged(tree: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The tree with the keys of another put over its own, section by section."""
    both = dict(tree)
    for key, value in other.items():
        own = both.get(key)
        both[key] = {**own, **value} if isinstance(own, dict) and isinstance(value, dict) else value
    return both


def _check_defence(where: str, name: str, row: DefenceRow) -> None:
    try:
        if name != ORACLE:
            defences.create(name, **row.params)
        elif row.params or row.recipe:
            raise ValueError("oracle has no settings")
        for key in row.recipe:
            if key not in OWN:
                raise ValueError(f"recipe.{key} is the same for all defences; known here: {', '.join(OWN)}{nearest(key, OWN)}")
            if row.recipe[key] is None:
                raise ValueError(f"recipe.{key} is empty; give it a value, or drop it")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_sections(grid: Grid, network: str, where: str, sections: dict[str, Any]) -> None:
    recipe = network_recipe(grid, network, origin=where, **sections)
    try:
        check_methods(recipe)
    except ValueError as error:
        raise ValueError(f"{where} with networks.{network}: {error}") from None


def _first(error: ValidationError) -> str:
    """What is wrong with the grid's own keys, in one line."""
    entry = error.errors()[0]
    where = ".".join(str(part) for part in entry["loc"])
    if entry["type"] == "extra_forbidden":
        sections: dict[str, type[Section]] = {"attacks": AttackRow, "defences": DefenceRow}
        known = list(sections.get(str(entry["loc"][0]), Grid).model_fields) if len(entry["loc"]) > 1 else list(Grid.model_fields)
        return f"no key {where!r}; known here: {', '.join(known)}{nearest(str(entry['loc'][-1]), known)}"
    if entry["type"] == "missing":
        return f"key {where!r} is missing"
    return f"{where}={entry['input']!r}: {entry['msg'][0].lower()}{entry['msg'][1:]}"
