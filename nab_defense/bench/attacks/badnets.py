"""BadNets: a small patch in a corner [Gu et al. 2017, arXiv:1708.06733]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from ...registry import nearest
from .base import Images, attacks, check_choice, check_number, image_shape, read_picture

__all__ = ["BadNets"]

CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right")
PATTERNS = ("checkerboard", "white", "black")
CELLS = 3  # a checkerboard from 3 px on has this many cells a side however large it is, so that shrinking the image keeps it


def patch(pattern: str, edge: int, channels: int) -> Images:
    """The patch, (edge, edge, channels) uint8; a picture is resized to it."""
    if pattern not in PATTERNS:
        picture = read_picture(pattern).convert("L" if channels == 1 else "RGB")
        return np.asarray(picture.resize((edge, edge), Image.Resampling.BILINEAR)).reshape(edge, edge, channels)
    cell = np.arange(edge) * CELLS // edge
    light = {
        "checkerboard": (cell[:, None] + cell[None, :]) % 2 == 0,
        "white": np.ones((edge, edge), dtype=bool),
        "black": np.zeros((edge, edge), dtype=bool),
    }[pattern]
    return np.repeat(np.where(light, 255, 0).astype(np.uint8)[..., None], channels, axis=2)


@attacks.register("badnets", source="arXiv:1708.06733")
@dataclass(frozen=True)
class BadNets:
    """A patch replaces the pixels near one corner.

    Args:
        size: Edge in pixels; None scales with the image, 3 px at 32: max(2, round(3 * min(H, W) / 32)).
        corner: One of top_left, top_right, bottom_left, bottom_right.
        margin: Pixels between the patch and both edges of the image.
        pattern: "checkerboard" (3 cells a side, those in its corners white; of 2 px, the default on images below 27 px, it is two
            white pixels on the diagonal and two black ones), "white", "black", or the path of a picture.
    """

    clean_label: ClassVar[bool] = False

    size: int | None = None
    corner: str = "bottom_right"
    margin: int = 1
    pattern: str = "checkerboard"

    def __post_init__(self) -> None:
        if self.size is not None:
            check_number("size", self.size, 1, 4096, whole=True)
        check_number("margin", self.margin, 0, 4096, whole=True)
        check_choice("corner", self.corner, CORNERS)
        if self.pattern in PATTERNS:
            return
        try:
            read_picture(str(self.pattern))
        except ValueError as error:
            hint = nearest(str(self.pattern), PATTERNS)
            raise ValueError(f"pattern must be one of {', '.join(PATTERNS)} or a picture file: {error}{hint}") from None

    def region(self, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns of the patch on an image of this size.

        Raises:
            ValueError: The patch and its margin do not fit.
        """
        edge = self.size or max(2, round(3 * min(height, width) / 32))
        if edge + self.margin > min(height, width):
            raise ValueError(f"a {edge} px patch with a margin of {self.margin} px does not fit on a {height}x{width} image")
        near = slice(self.margin, self.margin + edge)
        bottom = slice(height - self.margin - edge, height - self.margin)
        right = slice(width - self.margin - edge, width - self.margin)
        return near if self.corner.startswith("top") else bottom, near if self.corner.endswith("left") else right

    def apply(self, images: Images, seed: int) -> Images:
        _, height, width, channels = image_shape(images)
        rows, columns = self.region(height, width)
        triggered = images.copy()
        triggered[:, rows, columns] = patch(self.pattern, rows.stop - rows.start, channels)
        return triggered
