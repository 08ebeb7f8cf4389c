"""A contact sheet of an attack: images before and after its trigger, to be looked at before its figures are believed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data import Source

__all__ = ["contact_sheet"]

COLUMNS, EDGE, GAP = 10, 64, 2  # images of a row; pixels of one at least, and between them
Pixels = NDArray[np.uint8]


def contact_sheet(pairs: list[tuple[Source, Source]]) -> Image.Image:
    """Three rows a pair: images as they are, as the attack leaves them, and the change, its largest value made white.

    Args: pairs: Sources before and after; those of the second are found in the first by their ids.

    Raises:
        ValueError: There is nothing to show."""
    rows = [row for before, after in pairs if len(after) for row in _rows(before, after)]
    if not rows:
        raise ValueError("a contact sheet needs images that the attack changes")
    width = max(row.shape[1] for row in rows)
    return Image.fromarray(np.concatenate([_padded(row, width) for row in rows]))


def _rows(before: Source, after: Source) -> list[Pixels]:
    places = {name: index for index, name in enumerate(before.ids)}
    chosen = np.unique(np.linspace(0, len(after) - 1, COLUMNS).round().astype(int)).tolist()
    plain = [_rgb(before.pixels(places[after.ids[index]])) for index in chosen]
    changed = [_rgb(after.pixels(index)) for index in chosen]
    changes = [np.abs(new.astype(int) - old) for old, new in zip(plain, changed, strict=True)]
    largest = max(1, *(int(change.max()) for change in changes))
    return [_row(plain), _row(changed), _row([(change * 255 // largest).astype(np.uint8) for change in changes])]


def _rgb(pixels: Pixels) -> Pixels:
    return np.broadcast_to(pixels.reshape(*pixels.shape[:2], -1), (*pixels.shape[:2], 3))


def _row(images: list[Pixels]) -> Pixels:
    large = [_enlarged(image, -(-EDGE // image.shape[0])) for image in images]
    height = GAP + max(len(image) for image in large)
    return np.concatenate([np.pad(image, ((0, height - len(image)), (0, GAP), (0, 0))) for image in large], axis=1)


def _enlarged(image: Pixels, times: int) -> Pixels:
    return image.repeat(times, 0).repeat(times, 1)


def _padded(row: Pixels, width: int) -> Pixels:
    return np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)))
