"""The recipe schema: strict YAML with overrides. No object of this file travels below the pipeline."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from . import io
from .registry import nearest

__all__ = ["Recipe", "load_recipe"]

REFUSED = {
    "mixup": "Mixup blends images after the stamp is painted",
    "cutmix": "CutMix pastes over the stamp after it is painted",
    "reprob": "the loader's random erasing can hide the stamp; use train.augment=albumentations, which erases before it",
}  # fmt: skip
Fraction = typing.Annotated[float, Field(gt=0, lt=1)]
Positive = typing.Annotated[int, Field(ge=1)]


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
    options: dict[str, Any] = {}
    truth: str | None = None


class Attack(Section):
    name: str
    rate: Fraction = 0.1
    target: int = Field(0, ge=0)
    mode: Literal["all_to_one", "all_to_all"] = "all_to_one"
    seed: int | None = None
    poison: bool = True
    params: dict[str, Any] = {}


class Model(Section):
    name: str = "resnet18"
    in_chans: Literal[1, 3] = 3
    small_stem: bool = False
    pretrained: bool = False
    kwargs: dict[str, Any] = {}


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
    params: dict[str, Any] = {}


class Relabel(Section):
    name: str = "unlearned"
    min_confidence: float = Field(0.5, ge=0, le=1)
    cover_fraction: float = Field(0.1, ge=0, lt=1)
    encoder: Model | None = None
    trusted: str | None = None
    params: dict[str, Any] = {}


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
    tree = io.load_yaml(Path(path))
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds {type(tree).__name__}, expected keys such as data, model, train")
    return parse_recipe({"name": Path(path).stem, **tree}, overrides, str(path))


def parse_recipe(tree: dict[str, Any], overrides: list[str] | tuple[str, ...], origin: str) -> Recipe:
    """Build a recipe from a nested dict and overrides; `origin` names it in messages."""
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign or not key:
            raise ValueError(f"{item!r} is not an override; write key=value, e.g. train.epochs=12")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"{item!r}: the value is not valid YAML; quote it") from None
        _put(tree, key.split("."), value, item)
    for section in (tree, tree.get("train")):
        for key in section if isinstance(section, dict) else ():
            if key in REFUSED:
                raise ValueError(f"{origin}: {key} cannot be used: {REFUSED[key]}")
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ValueError(f"{origin}: {_first(error)}") from None


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
    entries = sorted(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
    entry, more = entries[0], len(entries) - 1
    where = [str(part) for part in entry["loc"]]
    name, tail = ".".join(where), f" (and {more} more)" if more else ""
    if entry["type"] == "extra_forbidden":
        known = _keys(where[:-1])
        everywhere = [path for path in _paths(Recipe) if path.split(".")[-1] == where[-1]]
        hint = f"; did you mean {everywhere[0]!r}?" if everywhere else nearest(where[-1], known)
        return f"no key {name!r}; known here: {', '.join(known)}{hint}{tail}"
    if entry["type"] == "missing":
        return f"key {name!r} is missing{tail}"
    return f"{name}={entry['input']!r}: {entry['msg'][0].lower()}{entry['msg'][1:]}{tail}"


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
