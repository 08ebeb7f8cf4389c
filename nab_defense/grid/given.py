"""What a defence is handed: images in memory under neutral names, so that nothing tells which of them were poisoned."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data import Source, open_source
from ..data.sources import fingerprint
from ..schema import Data

__all__ = ["in_memory", "opened", "split_off"]


@dataclass(frozen=True, eq=False)
class Pictures:
    """Index -> image of (H, W) or (H, W, 3) uint8 arrays."""

    pixels: tuple[NDArray[np.uint8], ...]

    def __call__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


def in_memory(source: Source, name: str) -> Source:
    """A copy that knows its pixels and labels and nothing else: a file's name gives away its true class, and a poisoned
    source what paints it.

    Args: name: What it is called from now on."""
    arrays = [np.asarray(source.image(index)) for index in range(len(source))]
    marks = [hashlib.sha256(array.tobytes()).hexdigest() for array in arrays]
    ids = tuple(f"{index:06d}" for index in range(len(arrays)))
    labels = source.labels.copy()
    pictures = Pictures(tuple(arrays))
    return Source(name, source.classes, labels, ids, pictures, source.mode, fingerprint(ids, labels, marks), {})


@lru_cache(maxsize=4)
def _read(name: str, split: str, channels: int, strict: bool, options: tuple[tuple[str, Any], ...]) -> Source:
    return open_source(name, split=split, channels=channels, strict=strict, **dict(options))


def opened(data: Data, channels: int, *, test: bool = False) -> Source:
    """The training or the test images of a recipe, looked through once for all cells of a process.

    Raises:
        ValueError: They cannot be read, or their settings are no plain values."""
    try:
        options = tuple(sorted(data.options.items()))
        hash(options)
    except TypeError:
        raise ValueError(f"data.options must be plain values in a grid, got {data.options!r}") from None
    name = data.test if test else data.source
    assert name is not None  # a setting has both
    return _read(name, data.test_split if test else "train", channels, data.strict, options)


def split_off(source: Source, *, limit: int | None, clean: int, seed: int) -> tuple[Source, Source]:
    """Images to train on, `limit` of them or what is left, and `clean` others.

    The first come in an order that tells nothing: a folder's goes class by class, by which poison shows.

    Raises:
        ValueError: There are too few."""
    count = len(source) - clean if limit is None else limit
    if count < 2 or count + clean > len(source):
        raise ValueError(
            f"{source.name} has {len(source)} images: too few for clean={clean} beside data.limit={limit}; lower one of them"
        )
    order = np.random.default_rng([seed, 1]).permutation(len(source))
    return source.subset(order[:count]), source.subset(np.sort(order[count : count + clean]))
