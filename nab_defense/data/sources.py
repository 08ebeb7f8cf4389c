"""open_source: scikit-learn's digits, an image folder, WebDataset shards, or any name that timm's create_dataset takes.

A source is a map-style data set with stable sample ids and a fingerprint. It never swaps an unreadable file for a
neighbour (timm's ImageDataset does): such files are counted and named, and either refused or left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from ..registry import nearest
from .folder import read_folder
from .named import PREFIXES, read_named
from .shards import read_shards

__all__ = ["Chosen", "Loader", "Source", "View", "open_source"]

SHARDS = "wds/"
TEST = ("test", "validation", "val")  # of digits, which has one such part
OWN = "split", "channels", "strict", "labelled"  # arguments of open_source
Loader = Callable[[int], Image.Image]


@dataclass(frozen=True, eq=False)
class Source:
    """Images with the labels that came with them.

    Args:
        name: What the user called it.
        classes: Class names; labels index them.
        labels: (N,) int64.
        ids: N stable names: relative path, or index.
        load: Index -> PIL image in `mode`. It must pickle: where loader processes are spawned, the source is sent to them.
        mode: "RGB" or "L".
        fingerprint: Hash of ids, labels and the contents of all images.
        irregular: Kind of oddity -> ids of the files that show it ("palette", "16-bit", "truncated", ...; "grey" in color mode).
    """

    name: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    ids: tuple[str, ...]
    load: Loader
    mode: str
    fingerprint: str
    irregular: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        return 1 if self.mode == "L" else 3

    def image(self, index: int) -> Image.Image:
        return self.load(index)

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """(H, W, C) uint8."""
        array = np.asarray(self.load(index))
        return array[..., None] if array.ndim == 2 else array

    def edge(self) -> int:
        """Median of the longer edges of about 100 images, in pixels."""
        return int(np.median([max(self.image(i).size) for i in range(0, len(self), max(1, len(self) // 100))]))

    def view(self, transform: Callable[[Any], Any] | None = None) -> View:
        """A data set over this source; one for each loader, since timm's loader sets its transform."""
        return View(self, transform)

    def subset(self, indices: Sequence[int] | NDArray[np.int64] | NDArray[np.bool_]) -> Source:
        """Some of the samples: places, in any order, or an (N,) bool mask.

        Raises:
            ValueError: A mask of another length, or neither."""
        rows = np.asarray(indices)
        if rows.dtype == bool and rows.shape != (len(self),):
            raise ValueError(f"a mask for {len(self)} samples must be ({len(self)},), got {rows.shape}")
        if rows.ndim != 1 or (len(rows) and rows.dtype.kind not in "biu"):
            raise ValueError(f"samples are chosen by whole numbers or an (N,) bool mask, got {rows.shape} {rows.dtype}")
        chosen = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        return self.replaced(
            labels=self.labels[chosen],
            ids=tuple(self.ids[i] for i in chosen),
            load=Chosen(self.load, chosen),
            change="subset:" + hashlib.sha256(chosen.tobytes()).hexdigest(),
        )

    def replaced(self, *, labels: NDArray[np.int64], load: Loader, change: str, ids: tuple[str, ...] | None = None) -> Source:
        """A source with other labels, images or ids; `change` describes what differs and enters the fingerprint."""
        ids = self.ids if ids is None else ids
        return Source(
            name=self.name,
            classes=self.classes,
            labels=np.asarray(labels, dtype=np.int64),
            ids=ids,
            load=load,
            mode=self.mode,
            fingerprint=fingerprint(ids, labels, [self.fingerprint, change]),
            irregular=self.irregular,
        )

    def limited(self, count: int | None, seed: int) -> Source:
        """A random `count` of the samples, in their order; all of them when None or when there are not more."""
        if count is None or count >= len(self):
            return self
        return self.subset(np.sort(np.random.default_rng(seed).permutation(len(self))[:count]))


class View(Dataset[Any]):
    """The torch data set of a source: (transformed image, label). `transform` may be set, as timm's loader does."""

    def __init__(self, source: Source, transform: Callable[[Any], Any] | None = None) -> None:
        self.source = source
        self.transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image: Any = self.source.image(index)
        if self.transform is not None:
            image = self.transform(image)
        return image, int(self.source.labels[index])

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return Path(self.source.ids[index]).name if basename else self.source.ids[index]

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint


def open_source(
    name: str | Path,
    *,
    split: str = "train",
    channels: int | None = None,
    strict: bool = True,
    labelled: bool = True,
    **options: Any,
) -> Source:
    """Open a data set by name.

    Args:
        name: "digits"; a folder with one sub-folder a class; "wds/FOLDER", a folder of WebDataset shards; or a timm name such as
            "torch/cifar10", "hfds/cifar10".
        split: Which part of a named data set; a folder is taken as it is.
        channels: 1 or 3, what the model takes; None: what the images have, of a timm name 3. Images of a timm name are read
            so, and a plan for them fits the same number.
        strict: Refuse data with unreadable files; False leaves those files out, counted and named.
        labelled: False: labels will not be used, and a folder is any that holds images.
        options: Passed on to timm's create_dataset (root, download, ...).

    Raises:
        ValueError: A misspelt argument, nothing there, fewer than two classes, an empty class, unreadable files, or grey files
            for a model that takes three channels.
    """
    name = str(name)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    for key in options:  # which all but names of timm leave aside
        if meant := get_close_matches(key, OWN, n=1, cutoff=0.75):
            raise ValueError(f"open_source takes no {key!r}; did you mean {meant[0]!r}?")
    if name == "digits":
        if channels == 3:
            raise ValueError("all images in digits are grey and the model takes 3 channels; to train on it set model.in_chans=1")
        source = _digits(split)
    else:
        if name.split("/")[0].lower() in PREFIXES:
            folder = read_named(name, split, channels, options)
        elif name.startswith(SHARDS):
            folder = read_shards(Path(name[len(SHARDS) :]).expanduser(), channels, strict)
        else:
            folder = read_folder(Path(name).expanduser(), channels, strict, labelled=labelled)
        mark = fingerprint(folder.ids, folder.labels, folder.digests)
        source = Source(name, folder.classes, folder.labels, folder.ids, folder.load, folder.mode, mark, folder.irregular)
    if not labelled:
        return source
    if (source.labels < 0).any():
        raise ValueError(f"{name} has {(source.labels < 0).sum()} images without a label; name another split of it")
    counts = np.bincount(source.labels, minlength=len(source.classes))
    if len(source.classes) < 2:
        raise ValueError(f"{name} has one class ({source.classes[0]!r}); a classifier needs at least two")
    if (counts == 0).any():
        empty = source.classes[int(counts.argmin())]
        raise ValueError(
            f"class {empty!r} of {name} has no readable image; fill it, or remove it if a model without it is to be trained"
        )
    return source


def fingerprint(ids: Sequence[str], labels: NDArray[np.int64], contents: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in ("\n".join(ids), ",".join(map(str, labels.tolist())), "\n".join(contents)):
        digest.update(part.encode("utf-8", "surrogateescape"))  # of file names that are not UTF-8
        digest.update(b"\0")
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Chosen:
    """Index -> image, of some of the images that `load` gives."""

    load: Loader
    rows: NDArray[np.int64]

    def __call__(self, index: int) -> Image.Image:
        return self.load(int(self.rows[index]))


def _array_image(images: NDArray[np.uint8], index: int) -> Image.Image:
    return Image.fromarray(images[index])


def _digits(split: str) -> Source:
    """1,797 real 8x8 digits; every fifth is for testing, so that the split never moves."""
    from sklearn.datasets import load_digits

    if split not in ("train", *TEST):
        raise ValueError(f"digits has no split {split!r}; known: train, {', '.join(TEST)}{nearest(split, TEST)}")
    data = load_digits()
    test = np.arange(len(data.images)) % 5 == 4
    chosen = np.flatnonzero(test if split in TEST else ~test)
    images = np.round(data.images[chosen] * 255 / 16).astype(np.uint8)
    labels = data.target[chosen].astype(np.int64)
    ids = tuple(f"digits/{i:04d}" for i in chosen)
    mark = [hashlib.sha256(images.tobytes()).hexdigest()]
    classes = tuple(str(c) for c in range(10))
    return Source("digits", classes, labels, ids, partial(_array_image, images), "L", fingerprint(ids, labels, mark), {})
