"""Store: the small images of one run, each source decoded once and held on the device for all stages."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import io, ranks
from ..runtime import spare_bytes
from .folder import FileImages
from .sources import Chosen, Loader, Source
from .transforms import RESIZED, resized

__all__ = ["Held", "Store"]

log = logging.getLogger(__name__)

SMALL = 64  # pixels; on larger images networks take so long that reading hardly counts, and memory is soon full
TOGETHER = 256  # images that one thread decodes in turn
SHARE = 0.25  # of the device's memory that is free when the store is made
ASSUMED = 4 << 30  # bytes taken for free where the system does not say


class Held:
    """All images of a source as one tensor, decoded when they are first asked for.

    Args:
        source: What to read.
        augment: One of RESIZED: how images of another size are brought to this one.
        size: Edge in pixels.
        device: Where they stay.
    """

    def __init__(self, source: Source, augment: str, size: int, device: torch.device) -> None:
        self.source, self.augment, self.size, self.device = source, augment, size, device
        self.untouched = False  # known once they are decoded: none had to be resized

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.source), self.source.channels, self.size, self.size

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape))

    @cached_property
    def pixels(self) -> Tensor:
        """(N, C, S, S) uint8 on the device.

        Raises:
            ValueError, OSError: What the source raises for an image that cannot be read."""
        pixels, transform = np.empty(self.shape, dtype=np.uint8), resized(self.augment, self.size)

        def fill(first: int) -> bool:
            sizes = set()
            for index in range(first, min(first + TOGETHER, len(self.source))):
                image = self.source.image(index)
                pixels[index] = transform(image)
                sizes.add(image.size)
            return sizes == {(self.size, self.size)}

        # Files are decoded side by side; what paints images may keep them, or networks, and does so one by one.
        *_, (load, _) = _origins(self.source)
        with ThreadPoolExecutor(None if isinstance(load, FileImages) else 1) as pool:
            self.untouched = all(list(pool.map(fill, range(0, len(self.source), TOGETHER))))
        text = "%s: %s images at %d px held in memory, %.1f MB"
        log.info(text, self.source.name, f"{len(self.source):,}", self.size, self.nbytes / 1e6)
        return torch.from_numpy(pixels).to(self.device)

    def serves(self, augment: str) -> bool:
        """Whether these are the pixels that this augmentation starts from."""
        return augment in RESIZED and (self.untouched or RESIZED[augment] == RESIZED[self.augment])


class Store:
    """What a run holds of its sources, within a fixed share of the memory.

    A source is known by what loads its images, so that other labels, and parts of it, share its pixels; a poisoned source loads
    its own.

    Args:
        size: Edge of the network's input, in pixels.
        device: Where the images stay.

    Attributes:
        record: A file of what was decided for training, kept by a run that may be resumed; None: decided anew each time.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.free = int(SHARE * _free_memory(device)) // (1 if device.type == "cuda" else ranks.beside())
        self.record: Path | None = None
        self._held: dict[Loader, list[Held]] = {}
        self._told: set[str] = set()

    def find(self, source: Source, augment: str) -> tuple[Held, NDArray[np.int64]] | None:
        """The images of a source and which of them are its own, in order; None where timm's loader is to read it.

        Nothing is decoded yet, but the room is taken."""
        for load, rows in _origins(source):
            for held in self._held.get(load, []):
                if held.serves(augment):
                    return held, rows
        made = Held(source, augment, self.size, self.device)
        refusal = self._refusal(made)
        if refusal:
            text = f"{source.name}: read by timm's loader: {refusal}"
            log.log(logging.DEBUG if text in self._told else logging.INFO, text)
            self._told.add(text)
            return None
        return self._hold(made)

    def settle(self, source: Source, augment: str) -> tuple[Held, NDArray[np.int64]] | None:
        """As find, for batches to train on, of which timm's loader draws others: as decided before, whatever is free now, and of
        several ranks by the first."""
        told: dict[str, bool] = io.load_json(self.record) if self.record is not None and self.record.exists() else {}
        key = f"{augment} {source.fingerprint}"
        found = self.find(source, augment) if told.get(key, True) else None
        held = ranks.same(told.get(key, found is not None))
        if self.record is not None:
            io.save_json(self.record, {**told, key: held})
        if held and found is None:
            log.info("%s: held all the same, as before or on the first rank", source.name)
            return self._hold(Held(source, augment, self.size, self.device))
        return found if held else None

    def _hold(self, made: Held) -> tuple[Held, NDArray[np.int64]]:
        self.free -= made.nbytes
        self._held.setdefault(made.source.load, []).append(made)
        return made, np.arange(len(made.source))

    def _refusal(self, made: Held) -> str:
        """Why a source is not to be held; "" where it is."""
        if made.augment not in RESIZED:
            return f"augment {made.augment!r} works image by image"
        if self.size > SMALL:
            return f"{self.size} px images are larger than {SMALL} px"
        if made.nbytes > self.free:
            return f"{made.nbytes / 1e6:.1f} MB are more than the {self.free / 1e6:.1f} MB that may be used"
        return ""


def _origins(source: Source) -> Iterator[tuple[Loader, NDArray[np.int64]]]:
    """What loads a source's images, and where they lie in it: first its own, then that of the set it is a part of, and so on."""
    load, rows = source.load, np.arange(len(source))
    yield load, rows
    while isinstance(load, Chosen):
        part: Chosen = load
        load, rows = part.load, part.rows[rows]
        yield load, rows


def _free_memory(device: torch.device) -> int:
    """Bytes; what the system, and a container's limit, could give without swapping, file cache included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    spare = spare_bytes()
    return ASSUMED if spare is None else spare
