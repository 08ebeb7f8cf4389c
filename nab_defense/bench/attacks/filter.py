"""Filters: the whole image changed as photo programs do [Liu et al. 2019; Karra et al. 2020, arXiv:2003.07233], or turned
[Wu et al. 2022, arXiv:2207.10825]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import ClassVar

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from .base import Images, attacks, check_choice, check_number, image_shape

__all__ = ["Filter"]

Change = Callable[[Image.Image, float], Image.Image]


def _blur(picture: Image.Image, amount: float) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(amount * _pixel(picture)))


def _pixelate(picture: Image.Image, amount: float) -> Image.Image:
    block = amount * _pixel(picture)
    width, height = (max(1, round(edge / block)) for edge in picture.size)
    return picture.resize((width, height), Image.Resampling.BOX).resize(picture.size, Image.Resampling.NEAREST)


def _jpeg(picture: Image.Image, amount: float) -> Image.Image:
    stream = BytesIO()
    picture.save(stream, "jpeg", quality=round(amount))
    return Image.open(stream)


def _contrast(picture: Image.Image, amount: float) -> Image.Image:
    return ImageEnhance.Contrast(picture).enhance(amount)


def _solarize(picture: Image.Image, amount: float) -> Image.Image:
    return ImageOps.solarize(picture, round(amount))


def _warm(picture: Image.Image, amount: float) -> Image.Image:
    """Red is raised and blue lowered to a power; of grey images the only channel is raised."""
    levels = np.arange(256) / 255
    powers = (1 / amount, 1.0, amount)[: len(picture.getbands())]
    return picture.point([round(255 * level**power) for power in powers for level in levels])


def _rotate(picture: Image.Image, amount: float) -> Image.Image:
    """About the centre; what comes in from outside is the image, mirrored."""
    pixels = np.asarray(picture)
    rows, columns = (edge // 2 for edge in pixels.shape[:2])
    padded = np.pad(pixels, ((rows, rows), (columns, columns), *((0, 0),) * (pixels.ndim - 2)), mode="symmetric")
    turned = Image.fromarray(padded).rotate(amount, Image.Resampling.BICUBIC)
    return turned.crop((columns, rows, columns + picture.width, rows + picture.height))


def _pixel(picture: Image.Image) -> float:
    """A pixel of an image of 32, in those of this one; not less than one of its own."""
    return max(1.0, min(picture.size) / 32)


# Name -> how, amount, and the range that it may have.
KINDS: dict[str, tuple[Change, float, tuple[float, float]]] = {
    "blur": (_blur, 1.0, (0.1, 16)),
    "pixelate": (_pixelate, 2.0, (1.1, 16)),
    "jpeg": (_jpeg, 10.0, (1, 95)),
    "contrast": (_contrast, 0.5, (0, 10)),
    "solarize": (_solarize, 128.0, (0, 255)),
    "warm": (_warm, 1.6, (1.01, 10)),
    "rotate": (_rotate, 45.0, (-180, 180)),
}
FINE = ("blur", "pixelate", "jpeg")


@attacks.register("filter", source="arXiv:2003.07233")
@dataclass(frozen=True)
class Filter:
    """A change of the whole image that depends on what it shows: nothing that the images have in common is added to them.

    The papers' filters are those of a photo program, each several changes at once; ours are one change each, by Pillow.

    Args:
        kind: blur, pixelate, jpeg, contrast, solarize, warm (a gamma of each channel) or rotate (mirrored at the borders).
        amount: None: the kind's own. Of blur the deviation, of pixelate the edge of a block, both in pixels of an image of 32,
            and at least one of the image (1, 2); of jpeg the quality (10); of contrast the share that is kept (.5); of solarize
            the grey level above which it is inverted (128); of warm the exponent (1.6); of rotate the degrees (45).
    """

    clean_label: ClassVar[bool] = False

    kind: str = "blur"
    amount: float | None = None

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, tuple(KINDS))
        if self.amount is not None:
            check_number("amount", self.amount, *KINDS[self.kind][2])

    @property
    def fine(self) -> bool:
        return self.kind in FINE

    def apply(self, images: Images, seed: int) -> Images:
        channels = image_shape(images)[3]
        change, amount, _ = KINDS[self.kind]
        painted = np.empty_like(images)
        for place, image in enumerate(images):
            picture = Image.fromarray(image if channels == 3 else image[..., 0])
            changed = change(picture, amount if self.amount is None else float(self.amount))
            painted[place] = np.asarray(changed.convert(picture.mode)).reshape(image.shape)
        return painted
