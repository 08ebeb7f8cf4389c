"""WebDataset shards as a map-style source: tar files whose images are found by their place, so that ids are stable."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

from .folder import EXTENSIONS, Folder, read_files

__all__ = ["read_shards"]

LABEL, NAMES = "cls", "classes.txt"


@dataclass(frozen=True)
class _Member:
    """A file inside an uncompressed tar, read without going through the tar."""

    shard: Path
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def read_shards(root: Path, channels: int | None, strict: bool) -> Folder:
    """Read the *.tar of a folder, as read_folder reads one of images.

    A sample is what shares a name up to its first dot: an image and, as "cls", the number of its class in ASCII. The names of the
    classes are the lines of classes.txt beside the shards; without it they are their numbers.

    Args:
        root: The folder; ids are "shard.tar/name.png", in the order of the shards' names.
        channels, strict: As in read_folder.

    Raises:
        ValueError: No shards, a compressed or broken one, an image without a label or twice in a sample, a label that is no
            number or has no name, or what read_folder refuses."""
    shards = sorted(root.glob("*.tar")) if root.is_dir() else []
    if not shards:
        raise ValueError(f"no *.tar in {root}; wds/FOLDER names a folder of WebDataset shards")
    files: list[_Member] = []
    ids: list[str] = []
    labels: list[int] = []
    for shard in shards:
        images, numbers = _read_shard(shard)
        for key, (name, member) in images.items():
            if key not in numbers:
                raise ValueError(f"{shard}: {name} has no label; expected {key}.{LABEL} with the number of its class")
            files.append(member)
            ids.append(f"{shard.name}/{name}")
            labels.append(numbers[key])
    if not files:
        raise ValueError(f"the shards in {root} hold no image ({', '.join(sorted(EXTENSIONS))})")
    if max(labels) >= len(labels):
        raise ValueError(
            f"{ids[labels.index(max(labels))]} has label {max(labels)}, of {len(labels)} images: some class has none"
        )
    return read_files(root, _names(root, max(labels)), files, labels, ids, channels, strict)


def _read_shard(shard: Path) -> tuple[dict[str, tuple[str, _Member]], dict[str, int]]:
    """By the name of their sample: images, and labels."""
    images: dict[str, tuple[str, _Member]] = {}
    numbers: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                folder, _, base = info.name.rpartition("/")
                stem, _, ending = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                member = _Member(shard, info.offset_data, info.size)
                if not info.isfile() or any(part.lstrip(".") and part.startswith(".") for part in info.name.split("/")):
                    continue  # hidden ones are of other programs, as in folders
                if ending == LABEL:
                    numbers[key] = _number(shard, info.name, member.read_bytes())
                elif Path(base).suffix.lower() in EXTENSIONS:
                    if key in images:
                        raise ValueError(f"{shard}: sample {key} holds two images, {images[key][0]} and {info.name}; leave one")
                    images[key] = info.name, member
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is not a plain tar ({error}); shards must not be compressed") from None
    return images, numbers


def _number(shard: Path, name: str, text: bytes) -> int:
    if not text.strip().isdigit():
        raise ValueError(f"{shard}: {name} holds {text[:20]!r}, expected the number of a class, from 0")
    return int(text)


def _names(root: Path, largest: int) -> tuple[str, ...]:
    listed = root / NAMES
    if not listed.exists():
        return tuple(map(str, range(largest + 1)))
    names = tuple(line.strip() for line in listed.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    if largest >= len(names):
        raise ValueError(f"{listed} names {len(names)} classes, the shards have labels up to {largest}")
    return names
