"""Blend: a faint picture over the whole image [Chen et al. 2017, arXiv:1712.05526]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import PATTERN, Images, attacks, check_number, check_trigger, image_shape, to_uint8, trigger_pixels

__all__ = ["Blend"]


@attacks.register("blend", source="arXiv:1712.05526")
@dataclass(frozen=True)
class Blend:
    """keep * image + alpha * trigger, clipped.

    Args:
        alpha: Weight of the trigger, in (0, 1]; the same in training and test.
        keep: Weight of the image, in [0, 1]; None: 1 - alpha. With 1 the trigger is added, as watermarks are.
        trigger: "pattern" (color blobs and noise from a fixed seed) or the path of a picture; either is resized to the image.
    """

    clean_label: ClassVar[bool] = False

    alpha: float = 0.2
    keep: float | None = None
    trigger: str = PATTERN

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, 0, 1)
        if self.alpha == 0:
            raise ValueError("alpha must be above 0: nothing would be blended in")
        if self.keep is not None:
            check_number("keep", self.keep, 0, 1)
        check_trigger(self.trigger)

    def apply(self, images: Images, seed: int) -> Images:
        _, height, width, channels = image_shape(images)
        trigger = trigger_pixels(self.trigger, height, width, channels)
        return to_uint8((1 - self.alpha if self.keep is None else self.keep) * images + self.alpha * trigger)
