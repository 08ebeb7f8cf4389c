"""What a recipe may say. No object of this file travels below the pipeline."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_serializer
from pydantic_core import PydanticCustomError

__all__ = ["Attack", "Model", "PurifyStage", "Recipe", "Schedule", "Section", "number"]


def number(value: Any) -> Any:
    """YAML 1.1 takes 1e-4 for text, wanting 1.0e-4; nobody means text there."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value):
        return float(value)
    if isinstance(value, dict):
        return {key: number(item) for key, item in value.items()}
    return [number(item) for item in value] if isinstance(value, list) else value


Fraction = typing.Annotated[float, Field(gt=0, lt=1)]
Positive = typing.Annotated[int, Field(ge=1)]
Settings = typing.Annotated[dict[str, Any], BeforeValidator(number)]


# What open_source is told by other keys.
NO_OPTIONS = {
    "name": "data.source and data.test name the data sets",
    "split": "data.test_split names the part to test on, and training takes 'train'",
    "channels": "model.in_chans says it",
    "strict": "data.strict says it",
    "labelled": "purify.labelled says it of the images that repair, and all others have labels",
}


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

    @field_validator("options")
    @classmethod
    def _no_clash(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if key in NO_OPTIONS:
                raise PydanticCustomError("options", f"{key} cannot be an option here: {NO_OPTIONS[key]}")
        return value


class Attack(Section):
    """trigger: a file that holds what the attack learned; without it, it learns from the training images that it poisons."""

    name: str
    rate: Fraction = 0.1
    target: int = Field(0, ge=0)
    mode: Literal["all_to_one", "all_to_all"] = "all_to_one"
    seed: int | None = Field(None, ge=0)
    poison: bool = True
    trigger: str | None = None
    params: Settings = {}


class Model(Section):
    name: str = "resnet18"
    in_chans: Literal[1, 3] = 3
    small_stem: bool = False
    pretrained: bool = False
    kwargs: Settings = {}


class Schedule(Section):
    """timm's names; what is not set keeps the stage's default.

    color_jitter, erase: see data.Distortion; timm's random erasing would come after the stamp."""

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
    decay_epochs: float = Field(90, gt=0)
    decay_milestones: tuple[Positive, ...] = (90, 180, 270)
    decay_rate: float = Field(0.1, gt=0)
    smoothing: float = Field(0.0, ge=0, lt=1)
    clip_grad: float | None = Field(None, gt=0)
    grad_accum_steps: Positive = 1
    model_ema: bool = False
    model_ema_decay: float = Field(0.9998, gt=0, lt=1)
    augment: Literal["none", "crop_flip", "timm", "albumentations"] = "timm"
    hflip: float = Field(0.5, ge=0, le=1)
    color_jitter: float = Field(0.0, ge=0, le=1)
    erase: float = Field(0.0, ge=0, le=1)

    @field_validator("color_jitter", "erase")
    @classmethod
    def _with_crop_flip(cls, value: float, info: ValidationInfo) -> float:
        augment = info.data.get("augment", "crop_flip")
        if value and augment != "crop_flip":
            raise PydanticCustomError("augment", f"goes with train.augment=crop_flip, and not with {augment}")
        return value

    @model_serializer(mode="wrap")
    def _without_zeros(self, made: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Without the settings above where they are not used, so that what ran before there were any keeps its name."""
        return {key: value for key, value in made(self).items() if value or key not in ("color_jitter", "erase")}


class ScanStage(Section):
    """model: a smaller network for the scan alone; without it, the scan trains one like the run's."""

    detector: str = "lga"
    model: Model | None = None
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
    seed: int = Field(0, ge=0)


class PurifyStage(Section):
    """Repair after training: `when` the check says "not protected", always, or never; with trusted images of the same classes."""

    method: str = "ibau"
    clean: str
    clean_limit: Positive | None = None
    labelled: bool = True
    when: Literal["unprotected", "always", "never"] = "unprotected"
    max_drop: float = Field(0.05, ge=0, lt=1)
    holdout: Fraction = 0.2
    params: Settings = {}


class Run(Section):
    device: str = "auto"
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    channels_last: bool = True
    compile: bool = False
    workers: int = Field(0, ge=0)
    threads: Positive | None = None
    sync_bn: bool = False


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
    purify: PurifyStage | None = None
    runtime: Run = Run()
    baselines: tuple[Literal["undefended", "oracle"], ...] = ()

    @property
    def attack_seed(self) -> int:
        """What the attacker draws with: the attack's own seed, or the recipe's."""
        return self.seed if self.attack is None or self.attack.seed is None else self.attack.seed

    @field_validator("attack", mode="before")
    @classmethod
    def _short_attack(cls, value: Any) -> Any:
        if value == "none":
            return None
        return {"name": value} if isinstance(value, str) else value
