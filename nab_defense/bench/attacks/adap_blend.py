"""Adap-Blend: pieces of a faint picture in training, covers too; all of it at test time [Qi et al. 2023, arXiv:2205.13613]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .base import PATTERN, Images, attacks, check_covers, check_number, check_trigger, image_shape, to_uint8, trigger_pixels

__all__ = ["AdapBlend"]


def piece_masks(count: int, height: int, width: int, *, pieces: int, share: float, seed: int) -> NDArray[np.bool_]:
    """(N, H, W) bool: of the pieces x pieces tiles of each image, round(share * pieces^2) drawn at random, at least one."""
    shown = max(1, round(share * pieces**2))
    tiles = np.broadcast_to(np.arange(pieces**2) < shown, (count, pieces**2))
    tiles = np.random.default_rng(seed).permuted(tiles, axis=1).reshape(count, pieces, pieces)
    rows, columns = (np.arange(edge) * pieces // edge for edge in (height, width))
    return np.asarray(tiles[:, rows[:, None], columns[None, :]])


@attacks.register("adap_blend", source="arXiv:2205.13613")
@dataclass(frozen=True)
class AdapBlend:
    """(1 - alpha) * image + alpha * trigger on the chosen pieces; on all of them, with test_alpha, at test time.

    Covers are painted as poison is and keep their label, so that the trigger alone does not set poison apart in a network's
    features: only the full, stronger trigger leads safely to the target. They come from all classes but the target, the authors'
    from all.

    Args:
        alpha: Weight of the trigger in training, in (0, 1].
        test_alpha: Weight of the trigger at test time, in (0, 1].
        pieces: Tiles along each side, in [1, 16].
        share: Share of the tiles that a training image shows, in (0, 1].
        covers: Images that become covers for each poisoned one, in [0, 20]; in the paper 1.
        trigger: "pattern" (color blobs and noise from a fixed seed) or the path of a picture; either is resized to the image.
    """

    clean_label: ClassVar[bool] = False
    cover_target: ClassVar[bool] = False

    alpha: float = 0.15
    test_alpha: float = 0.2
    pieces: int = 4
    share: float = 0.5
    covers: float = 0.5
    trigger: str = PATTERN

    def __post_init__(self) -> None:
        check_covers(self.covers)
        for name in ("alpha", "test_alpha", "share"):
            check_number(name, getattr(self, name), 0, 1)
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be above 0: nothing would be blended in")
        check_number("pieces", self.pieces, 1, 16, whole=True)
        check_trigger(self.trigger)

    def apply(self, images: Images, seed: int) -> Images:
        count, height, width, channels = image_shape(images)
        if self.pieces > min(height, width):
            raise ValueError(f"{self.pieces} pieces a side do not fit on a {height}x{width} image")
        masks = piece_masks(count, height, width, pieces=self.pieces, share=self.share, seed=seed)
        weights: NDArray[Any] = self.alpha * masks[..., None]
        return to_uint8((1 - weights) * images + weights * trigger_pixels(self.trigger, height, width, channels))

    def cover(self, images: Images, seed: int) -> Images:
        return self.apply(images, seed)

    def at_test(self, images: Images, seed: int) -> Images:
        _, height, width, channels = image_shape(images)
        trigger = trigger_pixels(self.trigger, height, width, channels)
        return to_uint8((1 - self.test_alpha) * images + self.test_alpha * trigger)
