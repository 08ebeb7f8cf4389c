"""The recipe schema: strict YAML with overrides. No object of this file travels below the pipeline."""

from __future__ import annotations

import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from . import io
from .registry import nearest

__all__ = ["Recipe", "key_values", "load_recipe", "parse_recipe"]

REFUSED = {
    "mixup": "Mixup blends images after the stamp is painted",
    "cutmix": "CutMix pastes over the stamp after it is painted",
    "reprob": "the loader's random erasing can hide the stamp; use train.augment=albumentations, which erases before it",
}  # fmt: skip
HOLDERS = ("params", "kwargs", "options")  # where a section keeps the settings of what it names


def _number(value: Any) -> Any:
    """YAML 1.1 takes 1e-4 for text, wanting 1.0e-4; nobody means text there."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)
    if isinstance(value, dict):
        return {key: _number(item) for key, item in value.items()}
    return [_number(item) for item in value] if isinstance(value, list) else value


Fraction = typing.Annotated[float, Field(gt=0, lt=1)]
Positive = typing.Annotated[int, Field(ge=1)]
Settings = typing.Annotated[dict[str, Any], BeforeValidator(_number)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    source: str
    test: str | None = None
    test_split: str = "test"
    limit: Positive | None = None
    test_limit: Positive | None = None
    strict: bool = True
    size: Positive | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    options: Settings = {}
    truth: str | None = None


class Attack(Section):
    name: str
    rate: Fraction = 0.1
    target: int = Field(0, ge=0)
    mode: Literal["all_to_one", "all_to_all"] = "all_to_one"
    seed: int | None = None
    poison: bool = True
    params: Settings = {}


class Model(Section):
    name: str = "resnet18"
    in_chans: Literal[1, 3] = 3
    small_stem: bool = False
    pretrained: bool = False
    kwargs: Settings = {}


class Schedule(Section):
    """timm's names; what is not set keeps the stage's default."""

    epochs: Positive = 30
    batch_size: Positive = 128
    opt: str = "sgd"
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    sched: str = "cosine"
    warmup_epochs: int = Field(0, ge=0)
    warmup_lr: float = Field(1e-5, ge=0)
    min_lr: float = Field(0.0, ge=0)
    smoothing: float = Field(0.0, ge=0, lt=1)
    clip_grad: float | None = Field(None, gt=0)
    grad_accum_steps: Positive = 1
    model_ema: bool = False
    model_ema_decay: float = Field(0.9998, gt=0, lt=1)
    augment: Literal["none", "crop_flip", "timm", "albumentations"] = "timm"
    hflip: float = Field(0.5, ge=0, le=1)


class ScanStage(Section):
    detector: str = "lga"
    epochs: Positive = 5
    batch_size: Positive = 64
    lr: float = Field(0.02, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    gamma: float = Field(0.5, gt=0)
    form: Literal["flooding", "per_sample"] = "flooding"
    params: Settings = {}


class Relabel(Section):
    name: str = "unlearned"
    min_confidence: float = Field(0.5, ge=0, le=1)
    cover_fraction: float = Field(0.1, ge=0, lt=1)
    encoder: Model | None = None
    trusted: str | None = None
    params: Settings = {}


class StampStage(Section):
    size: Positive | None = None
    corner: str = "top_left"
    value: float | Literal["mean", "noise"] = "mean"
    seed: int = 0


class Run(Section):
    device: str = "auto"
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    channels_last: bool = True
    compile: bool = False
    workers: int = Field(0, ge=0)
    threads: Positive | None = None


class Recipe(Section):
    """Everything a run depends on.

    rule: "expand": seeds of `fraction`, expanded where the data shows two groups, sure labels stamped, others dropped;
    "paper": the textbook rule, the top `fraction` relabelled and stamped whatever they are."""

    name: str
    seed: int = Field(0, ge=0)
    data: Data
    attack: Attack | None = None
    model: Model = Model()
    rule: Literal["expand", "paper"] = "expand"
    fraction: Fraction = 0.05
    scan: ScanStage = ScanStage()
    relabel: Relabel = Relabel()
    stamp: StampStage = StampStage()
    train: Schedule = Schedule()
    runtime: Run = Run()
    baselines: tuple[Literal["undefended", "oracle"], ...] = ()

    @field_validator("attack", mode="before")
    @classmethod
    def _short_attack(cls, value: Any) -> Any:
        if value == "none":
            return None
        return {"name": value} if isinstance(value, str) else value


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
            values[key] = _number(yaml.safe_load(text))
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
