"""Reading a recipe: strict YAML with overrides, and messages that say how to mend it."""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from . import io
from .registry import nearest
from .schema import Recipe, Section, number

__all__ = ["key_values", "load_recipe", "parse_recipe"]

REFUSED = {
    "mixup": "Mixup blends images after the stamp is painted",
    "cutmix": "CutMix pastes over the stamp after it is painted",
    "reprob": "the loader's random erasing can hide the stamp; use train.erase (and train.augment=crop_flip), which comes first",
}  # fmt: skip
HOLDERS = ("params", "kwargs", "options")  # where a section keeps the settings of what it names


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: A YAML file; its stem names the recipe where it does not itself.
        overrides: "section.key=value", values in YAML.

    Raises:
        ValueError: One line that names the key, the value, what is allowed and the nearest right spelling.
    """
    path = Path(path)
    if not path.exists() and path.parent.is_dir():
        raise ValueError(f"no such recipe: {path}{nearest(path.name, [p.name for p in path.parent.iterdir()])}")
    tree = io.load_yaml(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds {type(tree).__name__}, expected keys such as data, model, train")
    return parse_recipe({"name": path.stem, **tree}, overrides, str(path))


def parse_recipe(tree: dict[str, Any], overrides: list[str] | tuple[str, ...], origin: str) -> Recipe:
    """Build a recipe from a nested dict and overrides; `origin` names it in messages."""
    tree = dict(tree)
    for key, value in key_values(overrides, example="train.epochs=12").items():
        _put(tree, key.split("."), value, f"{key}={value}")
    for section in (tree, tree.get("train")):
        for key in section if isinstance(section, dict) else ():
            if key in REFUSED:
                raise ValueError(f"{origin}: {key} cannot be used: {REFUSED[key]}")
    tree = {key: value for key, value in tree.items() if value is not None or key not in Recipe.model_fields}
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{origin}: {_first(error)}") from None


def key_values(items: list[str] | tuple[str, ...], *, example: str) -> dict[str, Any]:
    """["size=3", "pattern=white"] -> {"size": 3, "pattern": "white"}; values in YAML."""
    values = {}
    for item in items:
        key, sign, text = item.partition("=")
        if not sign or not key.strip("."):
            raise ValueError(f"{item!r} is not a setting; write key=value, e.g. {example}")
        try:
            values[key] = number(yaml.safe_load(text))
        except yaml.YAMLError:
            raise ValueError(f"{item!r}: the value is not valid YAML; quote it") from None
    return values


def _put(tree: dict[str, Any], keys: list[str], value: Any, item: str) -> None:
    for position, key in enumerate(keys[:-1]):
        if isinstance(tree.get(key), str):  # attack: blend, then attack.rate=.05
            tree[key] = {"name": tree[key]}
        if tree.get(key) is None:
            tree[key] = {}
        if not isinstance(tree[key], dict):
            raise ValueError(f"{item!r}: {'.'.join(keys[: position + 1])} is a value and has no keys")
        tree[key] = dict(tree[key])
        tree = tree[key]
    tree[keys[-1]] = value


def _first(error: ValidationError) -> str:
    """What is wrong, the unknown keys first, as they often explain the rest."""
    entries = sorted(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
    entry = entries[0]
    where = _place(entry["loc"])
    same = [e for e in entries if _place(e["loc"]) == where]  # one for each alternative of a union
    name, tail = ".".join(where), f" (and {len(entries) - len(same)} more)" if len(entries) > len(same) else ""
    if entry["type"] == "extra_forbidden":
        return f"no key {name!r}; known here: {', '.join(_keys(where[:-1]))}{_hint(where)}{tail}"
    if entry["type"] == "missing":
        return f"key {name!r} is missing{tail}"
    if entry["type"] == "model_type":
        return f"{name}={entry['input']!r}: expected keys such as {', '.join(_keys(where)[:4])}{tail}"
    reasons = " or ".join(dict.fromkeys(e["msg"][0].lower() + e["msg"][1:] for e in same))
    return f"{name}={entry['input']!r}: {reasons}{tail}"


def _hint(where: list[str]) -> str:
    """Where a key may have been meant to stand, or how it may have been meant to be spelled."""
    word, known = where[-1], _keys(where[:-1])
    homes = [path for path in _paths(Recipe) if path.split(".")[-1] == word]
    if homes:
        best = next((path for path in homes if path.startswith("train.")), homes[0])
        return f"; did you mean {best!r}?"
    if len(where) == 1:  # a bare key, misspelled: look everywhere
        paths = {path.split(".")[-1]: path for path in sorted(_paths(Recipe), key=lambda path: path.startswith("train."))}
        close = nearest(word, known) or nearest(word, paths)
        return re.sub(r"'(.*)'", lambda found: repr(paths.get(found[1], found[1])), close)
    holder = next((key for key in HOLDERS if key in known), None)
    return nearest(word, known) or (
        f"; settings of what it names go in {'.'.join([*where[:-1], holder, word])!r}" if holder else ""
    )


def _place(loc: tuple[int | str, ...]) -> list[str]:
    """A pydantic location without the names of a union's alternatives."""
    section: type[Section] | None = Recipe
    where: list[str] = []
    for part in loc:
        if section is not None:
            field = section.model_fields.get(str(part))
            section = None if field is None else _section(field.annotation)
        elif not isinstance(part, int):
            break
        where.append(str(part))
    return where


def _section(annotation: Any) -> type[Section] | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)


def _keys(path: list[str]) -> list[str]:
    section: type[Section] = Recipe
    for part in path:
        section = _section(section.model_fields[part].annotation) or section
    return list(section.model_fields)


def _paths(section: type[Section], prefix: str = "") -> list[str]:
    found = []
    for key, info in section.model_fields.items():
        found.append(prefix + key)
        inner = _section(info.annotation)
        if inner is not None:
            found += _paths(inner, f"{prefix}{key}.")
    return found
