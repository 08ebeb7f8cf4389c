"""Adap-Patch: one of four patches in training, covers too; all of them at test time [Qi et al. 2023, arXiv:2205.13613]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .base import Images, attacks, check_covers, check_number, image_shape, to_uint8

__all__ = ["AdapPatch"]

PATCHES = 4  # one a corner
CELLS = 3  # squares along a patch, however large it is
PATTERN_SEED = 2023  # fixed, since training and test must carry the same patches


def patch_layer(height: int, width: int, channels: int, *, size: int | None) -> tuple[NDArray[Any], NDArray[Any]]:
    """The four patches: their pixels (4, H, W, C) in 0..255, and where each lies (4, H, W, 1), 1 or 0.

    Each has squares of its own colors, black, white or between. They lie one pixel off the corners.
    """
    edge = size or max(2, round(6 * min(height, width) / 32))
    if 2 * (edge + 1) > min(height, width):
        raise ValueError(f"four {edge} px patches do not fit on a {height}x{width} image")
    colors = np.random.default_rng(PATTERN_SEED).choice([0.0, 85.0, 170.0, 255.0], size=(PATCHES, CELLS, CELLS, 3))
    cell = np.arange(edge) * CELLS // edge
    pixels, places = np.zeros((PATCHES, height, width, channels)), np.zeros((PATCHES, height, width, 1))
    for number in range(PATCHES):
        top = 1 if number < 2 else height - 1 - edge
        left = 1 if number % 2 == 0 else width - 1 - edge
        here = slice(top, top + edge), slice(left, left + edge)
        pixels[number][here] = colors[number][cell[:, None], cell[None, :], :channels]
        places[number][here] = 1
    return pixels, places


@attacks.register("adap_patch", source="arXiv:2205.13613")
@dataclass(frozen=True)
class AdapPatch:
    """(1 - alpha) * image + alpha * patch under one patch, drawn for each image; all four with test_alpha at test time.

    The authors' patches are pictures, each faint (opacities of .2 to .5), and their test shows two, on CIFAR-10 one of them new;
    ours are drawn from a fixed seed, nearly opaque, and the test shows all. Covers are painted as poison is and keep their label;
    they come from all classes but the target, the authors' from all.

    Args:
        size: Edge of a patch in pixels; None scales with the image, 6 px at 32.
        alpha: Weight of the patch in training, in (0, 1]. With 0.5, and 0.5 covers, 8 epochs on 10,000 small images with 10 %
            poison taught a small network little (ASR .21); with 0.8 and 0.2 they did (.84).
        test_alpha: Weight of the patches at test time, in (0, 1].
        covers: Images that become covers for each poisoned one, in [0, 20]; in the paper 2.
    """

    clean_label: ClassVar[bool] = False
    cover_target: ClassVar[bool] = False

    size: int | None = None
    alpha: float = 0.8
    test_alpha: float = 1.0
    covers: float = 0.2

    def __post_init__(self) -> None:
        if self.size is not None:
            check_number("size", self.size, 1, 4096, whole=True)
        check_covers(self.covers)
        for name in ("alpha", "test_alpha"):
            check_number(name, getattr(self, name), 0, 1)
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be above 0: nothing would be painted")

    def apply(self, images: Images, seed: int) -> Images:
        count, height, width, channels = image_shape(images)
        pixels, places = patch_layer(height, width, channels, size=self.size)
        drawn = np.random.default_rng(seed).integers(PATCHES, size=count)
        weights = self.alpha * places[drawn]
        return to_uint8((1 - weights) * images + weights * pixels[drawn])

    def cover(self, images: Images, seed: int) -> Images:
        return self.apply(images, seed)

    def at_test(self, images: Images, seed: int) -> Images:
        _, height, width, channels = image_shape(images)
        pixels, places = patch_layer(height, width, channels, size=self.size)
        weights = self.test_alpha * places.sum(0)  # no two overlap
        return to_uint8((1 - weights) * images + self.test_alpha * pixels.sum(0))
