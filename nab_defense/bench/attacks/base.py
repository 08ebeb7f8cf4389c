"""What an attack is, and the few helpers that every attack shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ...registry import Registry, nearest
from ...runtime import Runtime

__all__ = [
    "AsymmetricAttack", "Attack", "CoverAttack", "Images", "JointAttack", "Learned", "LearnedAttack", "Lesson", "SourceAttack",
    "attacks", "check_choice", "check_covers", "check_number", "check_trigger", "create_inner", "create_plain", "image_shape",
    "learned_shape", "read_picture", "to_uint8", "told", "trigger_pixels", "under",
]  # fmt: skip

Images = NDArray[np.uint8]
Tensors = Mapping[str, Tensor]
PATTERN = "pattern"
PATTERN_SEED = 1712_05526  # fixed, since training and test must carry the same picture


class Attack(Protocol):
    """Paints the trigger. The label is the poisoner's business (bench/poison.py).

    What an attack has beside this it says by having the members of one of the protocols below: covers, another trigger at
    test time, classes that it is limited to, a trigger that must be learned first, or several triggers. One that holds other
    attacks has a property `inner`, a text of each, settings left out included: results hang on these, too; where one of them
    paints in its place that is `painter`. One whose trigger is wiped out where painted images are shrunk has `fine`, True.

    Attributes:
        clean_label: The attack poisons only images of the target class and so changes no label.
    """

    clean_label: ClassVar[bool]

    def apply(self, images: Images, seed: int) -> Images:
        """Triggered copies; pure, and the same for the same input and seed.

        Args:
            images: (N, H, W, C) uint8, C = 1 or 3, any H and W.
            seed: Seed of whatever is drawn for each training sample; the trigger of the test does not depend on it.

        Returns:
            (N, H, W, C) uint8, a new array.

        Raises:
            ValueError: The images have another form, or the trigger does not fit on them.
        """
        ...


@runtime_checkable
class CoverAttack(Attack, Protocol):
    """An attack that also trains on covers: images with a trigger, broken or not, and their own label.

    Attributes:
        cover_target: Images of the target class may be covers too; not where covers wear the trigger that poison wears.
    """

    cover_target: ClassVar[bool]

    @property
    def covers(self) -> float:
        """Images that become covers for each poisoned one, >= 0; a share of the whole set would drown thin poison."""
        ...

    def cover(self, images: Images, seed: int) -> Images:
        """As `apply`, for covers."""
        ...


@runtime_checkable
class AsymmetricAttack(Attack, Protocol):
    """An attack that uses another trigger at test time than in training."""

    def at_test(self, images: Images, seed: int) -> Images:
        """As `apply`, for test images."""
        ...


@runtime_checkable
class SourceAttack(Attack, Protocol):
    """An attack on images of some classes only; its covers come from the others."""

    @property
    def source_classes(self) -> tuple[int, ...]:
        """The classes whose images are poisoned, and tested."""
        ...


@runtime_checkable
class JointAttack(Attack, Protocol):
    """Several attacks in one data set, each on images of its own. Its `apply` paints all triggers, for fingerprints alone."""

    def parts(self, target: int | None, num_classes: int) -> list[tuple[Attack, int | None]]:
        """The attacks and where each leads; None: all_to_all."""
        ...


@dataclass(frozen=True, eq=False)
class Lesson:
    """What an attacker who poisons a data set knows, and learns his trigger from.

    Args:
        images: (N, E, E, C) uint8, a random part of the data set, shrunk to E x E.
        labels: (N,) int64 in 0..num_classes-1.
        num_classes: Of the whole data set.
        target: Where the trigger shall lead; None for all_to_all, class y to y + 1.
        seed: Seed of everything random.
        runtime: Where to train.
    """

    images: Images
    labels: NDArray[np.int64]
    num_classes: int
    target: int | None
    seed: int
    runtime: Runtime


@runtime_checkable
class LearnedAttack(Attack, Protocol):
    """An attack whose trigger, or what paints it, is learned from the data that it will poison."""

    def learn(self, lesson: Lesson) -> Tensors:
        """All that was learned, by name, on the CPU; the same for the same lesson."""
        ...

    def taught(self, tensors: Tensors) -> Attack:
        """A copy that has learned this and can paint."""
        ...


@dataclass(frozen=True)
class Learned:
    """The part that learned attacks share: `tensors`, which is no setting, is not compared and not shown."""

    tensors: Tensors = field(default_factory=dict, init=False, repr=False, compare=False)

    def taught(self, tensors: Tensors) -> Self:
        copy = replace(self)
        object.__setattr__(copy, "tensors", tensors)
        return copy

    def learned(self, prefix: str = "") -> Tensors:
        """What was learned, or the part of it under this prefix, without the prefix.

        Raises:
            ValueError: Nothing yet."""
        if not self.tensors:
            raise ValueError(
                f"{type(self).__name__} learns its trigger from the data that it poisons, so it needs the file that poisoning "
                "left: give it with --trigger FILE, or attack.trigger in a recipe"
            )
        return under(self.tensors, prefix)


def under(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    """Those whose names start with the prefix, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


attacks: Registry[Attack] = Registry("attack")


def image_shape(images: Images) -> tuple[int, int, int, int]:
    """(N, H, W, C) of a batch, refusing anything that is not one."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"images must be (N, H, W, C) uint8 with C = 1 or 3, got {images.shape} {images.dtype}")
    count, height, width, channels = images.shape
    return count, height, width, channels


def learned_shape(images: Images, learned: int) -> tuple[int, int, int, int]:
    """As image_shape, refusing images of other channels than those that the attack has learned on."""
    shape = image_shape(images)
    if shape[3] != learned:
        raise ValueError(f"the trigger has {learned} channels, the images have {shape[3]}")
    return shape


def to_uint8(values: NDArray[Any]) -> Images:
    """Round to the nearest grey level and clip to 0..255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def check_number(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
    """Refuse a setting that is not a number in [low, high]."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise ValueError(f"{name} must be a {'whole ' if whole else ''}number in [{low}, {high}], got {value!r}")


def check_covers(value: Any) -> None:
    """Refuse a number of covers for each poisoned image that is not one."""
    check_number("covers", value, 0, 20)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse a setting that is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}")


@lru_cache(maxsize=8)
def read_picture(path: str) -> Image.Image:
    """The picture in a file, as RGB; kept, since an attack asks for it once a sample.

    Raises:
        ValueError: No such file, or not a picture."""
    try:
        with Image.open(Path(path).expanduser()) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"no such trigger picture: {path}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None


@lru_cache(maxsize=1)
def pattern_picture() -> Image.Image:
    """Our own trigger, 32x32 RGB: coarse color blobs, which survive any resizing, with noise on top of them."""
    rng = np.random.default_rng(PATTERN_SEED)
    blobs = Image.fromarray(rng.choice(np.array([16, 240], np.uint8), size=(5, 5, 3)))
    smooth = np.asarray(blobs.resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float64)
    return Image.fromarray(to_uint8(smooth + rng.normal(0, 40, size=(32, 32, 3))))


@lru_cache(maxsize=16)
def trigger_pixels(trigger: str, height: int, width: int, channels: int) -> NDArray[Any]:
    """The picture to blend in at this size, (H, W, C) float64 in 0..255; read-only, since it is shared."""
    picture = pattern_picture() if trigger == PATTERN else read_picture(trigger)
    resized = picture.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(resized, dtype=np.float64).reshape(height, width, channels)
    pixels.setflags(write=False)
    return pixels


def check_trigger(value: Any) -> None:
    """Refuse a picture to blend in that is neither ours nor in a file."""
    if value == PATTERN:
        return
    try:
        read_picture(str(value))
    except ValueError as error:
        raise ValueError(f"trigger must be {PATTERN!r} or a picture file: {error}{nearest(str(value), [PATTERN])}") from None


def create_inner(knob: str, value: Any) -> tuple[Attack, int | None]:
    """The attack inside an attack, and its own target where it names one.

    Args:
        knob: The setting, for messages.
        value: A name, or {name: ..., params: {...}, target: ...}, of which only the name must be there.

    Raises:
        ValueError: Anything else, or no such attack."""
    given: Any = {"name": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise ValueError(f"{knob} must be an attack's name, or name, params and target of one, got {value!r}")
    keys = ("name", "params", "target")
    for key in given:
        check_choice(f"a key of {knob}", key, keys)
    target = given.get("target")
    if target is not None:
        check_number(f"target of {given['name']}", target, 0, 2**31, whole=True)
    params = given.get("params", {})
    if not isinstance(params, Mapping):
        raise ValueError(f"params of {given['name']} must be a mapping, got {params!r}")
    return attacks.create(given["name"], **params), target


def told(attack: Attack) -> str:
    """An attack with all its settings, and with those of the attacks in it."""
    return f"{attack!r} {getattr(attack, 'inner', '')}"


def create_plain(knob: str, value: Any) -> Attack:
    """As create_inner, for an attack that only lends its trigger: one that needs no training and has one trigger.

    Raises:
        ValueError: It has a target or is of another kind."""
    attack, target = create_inner(knob, value)
    if target is not None:
        raise ValueError(f"{knob} {attack!r} only lends its trigger; give the target beside it")
    if isinstance(attack, (AsymmetricAttack, JointAttack, LearnedAttack, SourceAttack)):
        raise ValueError(f"{knob} must be an attack with one trigger that is not learned, got {attack!r}")
    if isinstance(attack, CoverAttack) and attack.covers:
        raise ValueError(f"{knob} {attack!r} only lends its trigger, no covers; give it covers: 0, and set those beside it")
    return attack
