"""What an attack is, and the few helpers that every attack shares."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...registry import Registry, nearest

__all__ = [
    "Attack", "CoverAttack", "Images",
    "attacks", "check_choice", "check_number", "image_shape", "read_picture", "to_uint8",
]  # fmt: skip

Images = NDArray[np.uint8]


class Attack(Protocol):
    """Paints the trigger. The label is the poisoner's business (bench/poison.py).

    Attributes:
        clean_label: The attack poisons only images of the target class and so changes no label.
    """

    clean_label: ClassVar[bool]

    def apply(self, images: Images, seed: int) -> Images:
        """Triggered copies; pure, and the same for the same input and seed.

        Args:
            images: (N, H, W, C) uint8, C = 1 or 3, any H and W.
            seed: Seed of whatever differs between samples; the trigger itself never depends on it.

        Returns:
            (N, H, W, C) uint8, a new array.

        Raises:
            ValueError: The images have another form, or the trigger does not fit on them.
        """
        ...


@runtime_checkable
class CoverAttack(Attack, Protocol):
    """An attack that also trains on covers: images with a broken trigger and their own label."""

    @property
    def cover_fraction(self) -> float:
        """Share of the whole training set that becomes covers, in [0, 1]."""
        ...

    def cover(self, images: Images, seed: int) -> Images:
        """As `apply`, with a trigger that must not work."""
        ...


attacks: Registry[Attack] = Registry("attack")


def image_shape(images: Images) -> tuple[int, int, int, int]:
    """(N, H, W, C) of a batch, refusing anything that is not one."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"images must be (N, H, W, C) uint8 with C = 1 or 3, got {images.shape} {images.dtype}")
    count, height, width, channels = images.shape
    return count, height, width, channels


def to_uint8(values: NDArray[Any]) -> Images:
    """Round to the nearest grey level and clip to 0..255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def check_number(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
    """Refuse a setting that is not a number in [low, high]."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise ValueError(f"{name} must be a {'whole ' if whole else ''}number in [{low}, {high}], got {value!r}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse a setting that is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}")


@lru_cache(maxsize=8)
def read_picture(path: str) -> Image.Image:
    """The picture in a file, as RGB; kept, since an attack asks for it once a sample.

    Raises:
        ValueError: No such file, or not a picture.
    """
    try:
        with Image.open(Path(path).expanduser()) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"no such trigger picture: {path}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None
