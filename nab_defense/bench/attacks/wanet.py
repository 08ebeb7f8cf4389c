"""WaNet: a small smooth warp of the whole image [Nguyen and Tran 2021, arXiv:2102.10369]."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Images, attacks, check_covers, check_number, image_shape, to_uint8

__all__ = ["WaNet"]


@lru_cache(maxsize=16)
def control_field(k: int, field_seed: int, height: int, width: int) -> Tensor:
    """The warping field before its strength: (H, W, 2) float32 in (x, y) order; its k x k control points have mean size 1.

    Shared between calls: read it, never write to it.
    """
    points = torch.from_numpy(np.random.default_rng(field_seed).uniform(-1, 1, size=(1, 2, k, k)))
    points = (points / points.abs().mean()).float()
    return F.interpolate(points, size=(height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0).contiguous()


def warp(images: Images, shift: Tensor) -> Images:
    """Sample the images at shifted places.

    Args:
        images: (N, H, W, C) uint8.
        shift: (H, W, 2) or (N, H, W, 2), (x, y) in units of 1 / W and 1 / H of grid_sample's [-1, 1], that is half pixels.

    Returns:
        (N, H, W, C) uint8.
    """
    count, height, width, _ = image_shape(images)
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    grid = torch.stack((x, y), dim=-1) + shift / torch.tensor([width, height])
    grid = grid.clamp(-1, 1).expand(count, height, width, 2)  # as the authors do: nothing is sampled from outside
    pixels = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2)
    warped = F.grid_sample(pixels, grid, mode="bilinear", align_corners=True)
    return to_uint8(warped.permute(0, 2, 3, 1).numpy())


@attacks.register("wanet", source="arXiv:2102.10369")
@dataclass(frozen=True)
class WaNet:
    """One fixed warp for all images, s * field / H in grid coordinates: the same number of pixels at every image size.

    The authors draw poison and covers anew in every batch of a training that they control; here both are drawn once,
    since a poisoned data set is all that the attacker hands over.

    It is painted at the file's size; of images that are shrunk afterwards little of it is left, so shrink the images first.

    Args:
        k: Control points along each side, in [2, 64].
        s: Strength: about s / 2 pixels of mean shift, in (0, 16].
        field_seed: Seed of the field; the attacker's secret, the same in training and test.
        covers: Images that get the field plus noise with their own label for each poisoned one, in [0, 20]; in the paper 2.
    """

    clean_label: ClassVar[bool] = False
    cover_target: ClassVar[bool] = True
    fine: ClassVar[bool] = True

    k: int = 4
    s: float = 0.5
    field_seed: int = 0
    covers: float = 0.0

    def __post_init__(self) -> None:
        check_number("k", self.k, 2, 64, whole=True)
        check_number("s", self.s, 0, 16)
        check_number("field_seed", self.field_seed, 0, 2**32 - 1, whole=True)
        check_covers(self.covers)
        if self.s == 0:
            raise ValueError("s must be above 0: nothing would be warped")

    def apply(self, images: Images, seed: int) -> Images:
        _, height, width, _ = image_shape(images)
        return warp(images, self.s * control_field(self.k, self.field_seed, height, width))

    def cover(self, images: Images, seed: int) -> Images:
        """The paper's noise mode: the field plus uniform noise in [-1, 1], drawn for every pixel of every image from `seed`."""
        count, height, width, _ = image_shape(images)
        noise = np.random.default_rng(seed).uniform(-1, 1, size=(count, height, width, 2)).astype(np.float32)
        return warp(images, self.s * control_field(self.k, self.field_seed, height, width) + torch.from_numpy(noise))
