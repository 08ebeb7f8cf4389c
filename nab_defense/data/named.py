"""Data sets by a name that timm's create_dataset takes: torch/..., hfds/..."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset

from .folder import Folder

__all__ = ["PREFIXES", "NamedImages", "read_named"]

PREFIXES = "torch", "hfds"
TOGETHER = 64  # images to a hash of theirs: for a tiny image alone the threads cost more than the hash


@dataclass(frozen=True, eq=False)
class NamedImages:
    """Index -> image in `mode` of a data set that timm made. By way of its reader where it has one: timm's ImageDataset would
    return the next sample in place of an unreadable one."""

    name: str
    data: Any
    mode: str

    def __call__(self, index: int) -> Image.Image:
        reader = getattr(self.data, "reader", None)
        try:
            if reader is None:
                image: Image.Image = self.data[index][0]
                return image.convert(self.mode)
            with reader[index][0] as file:
                return Image.open(file).convert(self.mode)
        except (OSError, SyntaxError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"sample {index} of {self.name!r} cannot be read: {reason}") from error


def read_named(name: str, split: str, channels: int | None, options: dict[str, Any]) -> Folder:
    """Read a data set that timm's create_dataset knows.

    Args: as of open_source.

    Raises:
        ValueError: timm cannot open it, or one of its images cannot be read."""
    try:
        data = create_dataset(name, split=split, **{"root": None, **options})
    except Exception as error:  # create_dataset reaches into torchvision and Hugging Face code, which raise anything
        raise ValueError(f"timm cannot open {name!r}: {' '.join(str(error).split())[:300]}") from error
    mode = "L" if channels == 1 else "RGB"
    load, reader = NamedImages(name, data, mode), getattr(data, "reader", None)
    targets = getattr(data, "targets", getattr(data, "labels", None))
    if reader is not None:
        targets = _targets(reader)
    if targets is None:
        targets = [data[i][1] for i in range(len(data))]
    labels = np.asarray(targets, dtype=np.int64)
    known = getattr(reader, "class_to_idx", None) or getattr(data, "classes", None) or range(int(labels.max()) + 1)
    ids = tuple(f"{name}/{split}/{i}" for i in range(len(labels)))
    classes = tuple(str(c) for c in known)
    return Folder(classes, labels, ids, _pixel_digests(load, len(ids)), load, mode, {})


def _targets(reader: Any) -> list[int]:
    """The labels that one of timm's readers gives; before 1.0.31 it gave them with its files alone."""
    if hasattr(reader, "iter_targets"):
        return list(reader.iter_targets())
    targets = []
    for index in range(len(reader)):
        file, target = reader[index]
        file.close()
        targets.append(target)
    return targets


def _pixel_digests(load: NamedImages, count: int) -> tuple[str, ...]:
    """Hashes of all images as they are read, some to each. A few images alone would be hashed sooner, but a plan, or a scan
    that was kept, could then be taken for one of other images; and of a folder every file is read, too."""

    def digest(first: int) -> str:
        seen = hashlib.sha256()
        for index in range(first, min(first + TOGETHER, count)):
            pixels = np.asarray(load(index))
            seen.update(f"{pixels.shape}".encode() + pixels.tobytes())
        return seen.hexdigest()

    with ThreadPoolExecutor() as pool:
        return tuple(pool.map(digest, range(0, count, TOGETHER)))
