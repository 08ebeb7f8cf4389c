"""Read image files strictly: every one is decoded once, and whatever is odd about it is counted and named."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.utils.misc import natural_key

from ..registry import nearest

__all__ = ["EXTENSIONS", "File", "FileImages", "Folder", "read_files", "read_folder", "timm_order"]

EXTENSIONS = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
CACHE_BYTES = 1 << 30  # decoded images stay in memory up to this size
KINDS = {"1": "grey", "L": "grey", "LA": "grey", "P": "palette", "PA": "palette", "RGBA": "alpha", "CMYK": "CMYK", "RGB": ""}
Name = TypeVar("Name", str, Path)
BROKEN = ("zero-byte", "truncated", "unreadable")


class File(Protocol):
    """A path, or a place inside another file; it must pickle."""

    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class Folder:
    """A folder of images; see Source for the fields. `digests` hash the content of every file."""

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    ids: tuple[str, ...]
    digests: tuple[str, ...]
    load: Callable[[int], Image.Image]
    mode: str
    irregular: dict[str, list[str]]


@dataclass(frozen=True, eq=False)
class FileImages:
    """Index -> image in `mode`: from memory, or decoded anew from its file. A copy in another process has the files alone."""

    files: list[File]
    cache: dict[int, Image.Image]
    mode: str

    def __call__(self, index: int) -> Image.Image:
        image = self.cache.get(index)
        if image is None:
            image, _ = decode(self.files[index].read_bytes())
        return image if image.mode == self.mode else image.convert(self.mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": {}}  # up to CACHE_BYTES, which every loader process would be sent


def decode(data: bytes) -> tuple[Image.Image, str]:
    """An image in mode L or RGB and what is odd about the file ("" for 8-bit RGB).

    Raises:
        OSError, ValueError, SyntaxError: Not an image, or cut short.
    """
    image = Image.open(io.BytesIO(data))
    image.load()
    if image.mode.startswith(("I", "F")):  # PIL's own convert() would clip 16-bit values to white
        values = np.asarray(image, dtype=np.float64)
        top = values.max(initial=0)
        if image.mode == "F":
            scale = 255 if top < 2 else 255 / 65535 if top > 255 else 1  # of [0, 1], and a little beyond
        else:
            scale = 255 / 65535 if image.mode != "I" or top > 255 else 1  # a dark image of 16 bits is dark
        return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8)), "16-bit"
    kind = KINDS.get(image.mode, image.mode)
    return (image if image.mode in ("L", "RGB") else image.convert("L" if kind == "grey" else "RGB")), kind


def _inspect(file: File) -> tuple[Image.Image | None, str, str]:
    """(image or None, kind, digest) of one file."""
    try:
        data = file.read_bytes()
    except OSError:
        return None, "unreadable", ""
    digest = hashlib.sha256(data).hexdigest()
    if not data:
        return None, "zero-byte", digest
    try:
        image, kind = decode(data)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return None, "truncated" if "truncated" in str(error).lower() else "unreadable", digest
    return image, kind, digest


def read_folder(root: Path, channels: int | None, strict: bool, *, labelled: bool = True) -> Folder:
    """Read a folder with one sub-folder a class, classes and files in timm's order (2 before 10); without labels,
    all images below it.

    Args:
        root: The folder.
        channels: 1 or 3, what the model takes; None: 1 where all images are grey, else 3.
        strict: Refuse the folder when a file cannot be read; False leaves such files out.
        labelled: False: sub-folders mean nothing, and all images get label 0.

    Raises:
        ValueError: No folder, no classes, no images, unreadable files, or only grey ones for three channels.
    """
    classes, files, labels = _list(root, labelled)
    return read_files(root, classes, files, labels, [path.relative_to(root).as_posix() for path in files], channels, strict)


def read_files(
    root: Path,
    classes: tuple[str, ...],
    files: Sequence[File],
    labels: list[int],
    ids: list[str],
    channels: int | None,
    strict: bool,
) -> Folder:
    """Read N files with their labels and ids; `root` is what messages name, the rest is as in read_folder."""
    kept: list[int] = []
    cache: dict[int, Image.Image] = {}
    cached = 0
    irregular: dict[str, list[str]] = {}
    digests = []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), 256):  # in blocks, so that memory stays bounded
            block = files[start : start + 256]
            for index, (image, kind, digest) in enumerate(pool.map(_inspect, block), start):
                if kind:
                    irregular.setdefault(kind, []).append(ids[index])
                if image is None:
                    continue
                kept.append(index)
                digests.append(digest)
                cached += image.width * image.height * len(image.getbands())
                if cached <= CACHE_BYTES:
                    cache[len(kept) - 1] = image
    _refuse_broken(root, irregular, len(ids), strict)
    only_grey = sum(len(irregular.get(kind, [])) for kind in ("grey", "16-bit")) == len(kept) > 0
    if channels == 3 and only_grey:
        mend = "to train on them set model.in_chans=1; for a model that is trained save them as RGB"
        raise ValueError(f"all images in {root} are grey and the model takes 3 channels; {mend}")
    mode = "L" if channels == 1 or (channels is None and only_grey) else "RGB"
    if mode == "L":
        irregular.pop("grey", None)
    load = FileImages([files[i] for i in kept], cache, mode)
    chosen = np.asarray(kept, dtype=np.int64)
    return Folder(
        classes, np.asarray(labels, dtype=np.int64)[chosen], tuple(ids[i] for i in kept), tuple(digests), load, mode, irregular
    )


def _list(root: Path, labelled: bool) -> tuple[tuple[str, ...], list[Path], list[int]]:
    if not root.is_dir():
        if root.exists():
            raise ValueError(f"{root} is a file, expected a folder")
        siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise ValueError(f"no such folder or data set: {root}{nearest(root.name, siblings)}")
    if labelled:
        classes = tuple(timm_order(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
        if not classes:
            raise ValueError(f"{root} has no sub-folders; expected one for each class")
        files = timm_order(file for name in classes for file in _images(root / name))
        number = {name: label for label, name in enumerate(classes)}
        labels = [number[file.relative_to(root).parts[0]] for file in files]
    else:
        classes = ("unlabelled",)
        files = timm_order(_images(root))
        labels = [0] * len(files)
    if not files:
        raise ValueError(f"{root} holds no image ({', '.join(sorted(EXTENSIONS))})")
    return classes, files, labels


def timm_order(found: Iterable[Name]) -> list[Name]:
    """As timm sorts folders of classes, and files: 2 before 10."""
    return sorted(sorted(found), key=lambda one: natural_key(str(one)))


def _images(folder: Path) -> Iterator[Path]:
    """Of all below it, through links too, but what is hidden: previews and copies that other programs keep there."""
    for where, folders, names in os.walk(folder, followlinks=True):
        here = Path(where)
        if here.is_symlink() and here.resolve() in [parent.resolve() for parent in here.parents]:
            folders.clear()  # it leads back up
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        found = (here / name for name in names if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS)
        # a link that leads to nothing cannot be read, and is named for that
        yield from (path for path in found if path.is_file() or path.is_symlink())


def _refuse_broken(root: Path, irregular: dict[str, list[str]], total: int, strict: bool) -> None:
    broken: Sequence[str] = [f"{ident} ({kind})" for kind in BROKEN for ident in irregular.get(kind, [])]
    if broken and strict:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise ValueError(
            f"{len(broken)} of {total} files in {root} cannot be read: {', '.join(broken[:5])}{more}; "
            "remove them, or leave them out with data.strict=false"
        )
    if len(broken) == total:
        raise ValueError(f"none of the {total} files in {root} can be read; first: {broken[0]}")
