"""BppAttack: fewer grey levels, dithered [Wang et al. 2022, arXiv:2205.13383]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .base import Images, attacks, check_number, image_shape, to_uint8

__all__ = ["Bpp"]

# Floyd and Steinberg: (rows down, columns right, share of the error)
SPREAD = ((0, 1, 7 / 16), (1, -1, 3 / 16), (1, 0, 5 / 16), (1, 1, 1 / 16))


def quantized(values: NDArray[Any], bits: int) -> NDArray[Any]:
    """The nearest of 2^bits evenly spaced levels in 0..255: round(v / 255 * (2^d - 1)) / (2^d - 1) * 255 (eq. 3)."""
    top = 2**bits - 1
    return np.asarray(np.rint(np.clip(values, 0, 255) / 255 * top) / top * 255)


def dithered(images: Images, bits: int) -> NDArray[Any]:
    """Floyd-Steinberg dithering, every channel by itself, (N, H, W, C) -> float64 of the same shape.

    Pixels that share column + 2 * row lie on a front whose errors all go to later fronts; so a whole front of the whole batch is
    done at once, in W + 2 H steps instead of W * H, with the result of the pixel-by-pixel order.
    """
    count, height, width, channels = image_shape(images)
    work = np.zeros((count, height + 1, width + 2, channels))  # a border takes the errors that leave the image
    work[:, :height, 1:-1] = images
    for front in range(width + 2 * height - 2):
        rows = np.arange(max(0, (front - width + 2) // 2), min(height - 1, front // 2) + 1)
        columns = front - 2 * rows + 1
        level = quantized(work[:, rows, columns], bits)
        error = work[:, rows, columns] - level
        work[:, rows, columns] = level
        for down, right, share in SPREAD:
            work[:, rows + down, columns + right] += share * error
    return work[:, :height, 1:-1]


@attacks.register("bpp", source="arXiv:2205.13383")
@dataclass(frozen=True)
class Bpp:
    """The image with 2^bits levels a channel, dithered. Poison only: the paper's contrastive training needs the victim's loop.

    It is painted at the file's size; of images that are shrunk afterwards little of it is left, so shrink the images first.

    Args:
        bits: Bits a channel that are kept, in [1, 7]. With 10 % poison, 8 epochs on 10,000 small images taught a small network 2
            bits (ASR .99) and not 3 (.10), so the default is easier to see than the paper's.
        dither: Spread each pixel's error over its neighbors (Floyd-Steinberg); without it flat areas show bands.
    """

    clean_label: ClassVar[bool] = False
    fine: ClassVar[bool] = True

    bits: int = 2
    dither: bool = True

    def __post_init__(self) -> None:
        check_number("bits", self.bits, 1, 7, whole=True)

    def apply(self, images: Images, seed: int) -> Images:
        image_shape(images)
        return to_uint8(dithered(images, self.bits) if self.dither else quantized(images, self.bits))
