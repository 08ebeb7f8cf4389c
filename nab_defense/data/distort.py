"""Colors that vary and parts that are missing: what images are put through after crop and flip, and before their stamp."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Distortion", "adjusted", "draw_holes", "erased"]

AREA = (0.02, 0.33)  # share of an image that is erased; this and the next as in torchvision's RandomErasing
RATIO = (0.3, 3.3)  # height over width of what is erased
TRIES = 10  # at a part that lies within the image
GREY = (0.2989, 0.587, 0.114)  # torchvision's


@dataclass(frozen=True)
class Distortion:
    """Random colors and random erasing; none by default.

    Args:
        color_jitter: Brightness, contrast and saturation of an image are each changed by a factor drawn evenly from
            1 - color_jitter to 1 + color_jitter, in this order; in [0, 1].
        erase: Probability that a rectangle of an image turns black, as what a crop shows beyond the border is; in [0, 1].
            The channels' mean would be as common a filling, and is what the default stamp looks like.
    """

    color_jitter: float = 0.0
    erase: float = 0.0

    def draw(self, count: int, size: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Factors (3, count) float64 and holes (4, count) int64 for images of `size` px, see adjusted and erased; what is not
        asked for has no rows, and draws nothing. From torch's own generator by default."""
        factors, holes = torch.empty(0, count), torch.empty(0, count, dtype=torch.int64)
        if self.color_jitter > 0:
            drawn = torch.rand(3, count, dtype=torch.float64, generator=generator)
            factors = 1 - self.color_jitter + 2 * self.color_jitter * drawn
        if self.erase > 0:
            holes = draw_holes(count, size, probability=self.erase, generator=generator)
        return factors, holes

    def one(self, image: Tensor) -> Tensor:
        """One image (C, S, S) uint8, which may be changed; draws from torch's own generator. For pipelines, image by image."""
        return distorted(image[None], *self.draw(1, image.shape[-1]))[0]


def distorted(images: Tensor, factors: Tensor, holes: Tensor) -> Tensor:
    """Images (B, C, S, S) uint8 with what Distortion.draw drew for them; may be the same tensor, changed."""
    images = adjusted(images, factors) if len(factors) else images
    return erased(images, holes) if len(holes) else images


def adjusted(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, then contrast, then saturation of each image times a factor of its own; grey images have no saturation.

    To the bit what torchvision's adjust_brightness, adjust_contrast and adjust_saturation make of each image.

    Args:
        images: (B, C, H, W) uint8, C 1 or 3.
        factors: (3, B) float64, >= 0.

    Returns: (B, C, H, W) uint8, a copy."""
    own, rest = (part.float().view(3, -1, 1, 1, 1) for part in (factors, 1 - factors))
    values = images.float().mul_(own[0]).clamp_(0, 255).floor_()
    values = _blend(values, _grey(values).mean((1, 2, 3), keepdim=True), own[1], rest[1])
    if images.shape[1] == 3:
        values = _blend(values, _grey(values), own[2], rest[2])
    return values.to(torch.uint8)


def _blend(values: Tensor, other: Tensor, own: Tensor, rest: Tensor) -> Tensor:
    return values.mul_(own).add_(other.mul_(rest)).clamp_(0, 255).floor_()


def _grey(values: Tensor) -> Tensor:
    """(B, 1, H, W), a copy."""
    if values.shape[1] == 1:
        return values.clone()
    red, green, blue = (weight * channel for weight, channel in zip(GREY, values.split(1, dim=1), strict=True))
    return red.add_(green).add_(blue).floor_()


def draw_holes(count: int, size: int, *, probability: float, generator: torch.Generator | None = None) -> Tensor:
    """(4, count) int64: top, left, height and width of a rectangle in images of `size` px, distributed as those of torchvision's
    RandomErasing; 0 high where there is none."""
    drawn = torch.rand(2 * TRIES + 3, count, dtype=torch.float64, generator=generator)
    area = size**2 * (AREA[0] + (AREA[1] - AREA[0]) * drawn[:TRIES])
    low, high = map(math.log, RATIO)
    ratio = (low + (high - low) * drawn[TRIES : 2 * TRIES]).exp()
    edges = torch.stack([(area * ratio).sqrt().round(), (area / ratio).sqrt().round()])
    fits = (edges < size).all(0)
    first = fits.int().argmax(0).expand(2, 1, count)
    lengths = edges.gather(1, first)[:, 0]
    corner = (drawn[-3:-1] * (size - lengths + 1)).floor()
    lengths[0] *= (drawn[-1] < probability) & fits.any(0)
    return torch.cat([corner, lengths]).long()


def erased(images: Tensor, holes: Tensor) -> Tensor:
    """Images (B, C, H, W) uint8, changed in place: black where a rectangle (top, left, height, width) of `holes` (4, B) lies."""
    top, left, height, width = holes[:, :, None]
    rows, columns = (torch.arange(edge, device=images.device) for edge in images.shape[2:])
    kept_rows = (rows < top) | (rows >= top + height)
    kept_columns = (columns < left) | (columns >= left + width)
    # Not by a mask as index: a product is faster for bytes, and a GPU need not wait.
    return images.mul_(kept_rows[:, None, :, None] | kept_columns[:, None, None, :])
