"""Replay: the epochs of a scan, kept on disk, so that the same images are not trained on again for another detector."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import io
from .kept import hashed
from .runtime import Runtime
from .scan import EarlyScan, Scan
from .train import TrainConfig, fit

__all__ = ["fit_once", "scan_key"]

log = logging.getLogger(__name__)
CODE = Path(__file__).parent
# What images, batches, training and readings come from.
CODE_OF = [
    "scan.py", "train.py", "replay.py", "runtime.py", "loaders.py", "detectors/lga.py", "data/folder.py", "data/store.py",
    "data/loader.py", "data/resident.py", "data/transforms.py",
]  # fmt: skip
LARGEST = 2**31  # bytes that all kept scans may take


def scan_key(network: nn.Module, fingerprint: str, *, runtime: Runtime, **settings: Any) -> str:
    """A name for the scan that these make, alike for the same ones alone.

    Args:
        network: Before training; its weights count, so pretrained and differently seeded networks differ.
        fingerprint: Of the images and the labels as given.
        runtime: What changes rounding or draws.
        settings: JSON-able, all else that the batches and the training depend on; nothing of the detector."""
    known = {**settings, "fingerprint": fingerprint, "runtime": asdict(runtime), "hardware": runtime.hardware()}
    known |= {"threads": torch.get_num_threads(), **{name: version(name) for name in ("torch", "torchvision", "timm", "pillow")}}
    known["weights"] = hashed(network.state_dict())
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    for file in CODE_OF:
        digest.update((CODE / file).read_bytes())  # what better code makes must not be taken for it
    return digest.hexdigest()[:32]


def fit_once(
    network: nn.Module,
    loader: Any,
    passes: EarlyScan,
    *,
    key: str | None,
    runtime: Runtime,
    train: TrainConfig,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """fit() of a scan's network, which starts where an earlier one with the same key ended: same readings, same weights.

    What each epoch gave lies below NAB_CACHE (by default ~/.cache/nab_defense) in scans/<key>: the reading, and the training's
    state. Readings are shown to `passes` first. Where they end before it is content, training goes on from there. A broken
    file counts as missing. Above 2 GiB the scans that were used longest ago go; one that would need more is not kept.

    Args:
        network: As built; trained in place.
        loader: Shuffled batches.
        passes: What looks at each epoch.
        key: See scan_key; None, where several processes train one network, and where there is no room: nothing is kept.
        runtime, train, loss: As for fit."""
    folder = _folder(key)
    if folder is None:
        fit(network, loader, runtime=runtime, train=train, loss=loss, after_epoch=passes, title="scan")
        return
    kept, done, settled = _Kept(folder), 0, False
    while done < train.epochs and not settled and (seen := kept.read(done + 1, passes)) is not None:
        done, passes.last = done + 1, seen
        network.load_state_dict(io.load_state(kept.state(done))["model"])  # who looks may ask the network, too
        settled = passes.look(seen)
    if done:
        log.info("scan: epochs 1 to %d from the cache, %s", done, kept.folder)
    if settled or done == train.epochs:
        return
    current = kept.folder / f"{os.getpid()}.state"
    if done:
        shutil.copyfile(kept.state(done), current)

    def after_epoch(model: nn.Module, epoch: int) -> bool:
        stop = passes(model, epoch)
        assert passes.last is not None  # just read
        with _forgiven():
            kept.keep(passes.last, current, train.epochs)
        return stop

    try:
        fit(
            network,
            loader,
            runtime=runtime,
            train=train,
            loss=loss,
            after_epoch=after_epoch,
            state=current,
            resume=done > 0,
            title="scan",
        )
    finally:
        current.unlink(missing_ok=True)
    with _forgiven():
        kept.make_room()


@contextmanager
def _forgiven() -> Iterator[None]:
    """A scan goes on without its cache where the disk is full, or another process deletes there, too."""
    try:
        yield
    except OSError as error:
        log.info("the scan is not kept for other detectors: %s", error)


def _folder(key: str | None) -> Path | None:
    if key is None or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    try:
        folder = io.cache_folder("scans")
        free = shutil.disk_usage(folder).free
    except (OSError, ValueError) as error:
        log.info("the scan is not kept for other detectors: %s", error)
        return None
    if free >= LARGEST:
        return folder / key
    log.info("the scan is not kept: %d MB are free in %s, and it may take %d", free >> 20, folder, LARGEST >> 20)
    return None


class _Kept:
    """The files of one scan: for each epoch features, training state, and the rest with the checksums of those two."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        os.utime(folder)  # last used now

    def state(self, epoch: int) -> Path:
        return self.folder / f"epoch{epoch}.state"

    def _paths(self, epoch: int) -> tuple[Path, Path]:
        return self.folder / f"epoch{epoch}.npy", self.folder / f"epoch{epoch}.npz"

    def read(self, epoch: int, passes: EarlyScan) -> Scan | None:
        """What the network saw after an epoch; None where it is not there, or not whole."""
        features, rest = self._paths(epoch)
        try:
            arrays, sums = io.load_arrays(rest)
            if sums != [_checksum(features), _checksum(self.state(epoch))]:
                return None
            table = io.load_array(features)
        except (OSError, ValueError):
            return None
        return Scan(passes.labels, arrays["losses"], arrays["logits"], table, passes.fingerprint, epoch)

    def keep(self, seen: Scan, state: Path, epochs: int) -> None:
        features, rest = self._paths(seen.epoch)
        if (seen.features.nbytes + seen.logits.nbytes + state.stat().st_size) * epochs > LARGEST:
            return
        shutil.copyfile(state, self.state(seen.epoch))
        io.save_array(features, seen.features)
        sums = [_checksum(features), _checksum(self.state(seen.epoch))]
        io.save_arrays(rest, {"losses": seen.losses, "logits": seen.logits}, sums)  # last: with it the epoch is whole

    def make_room(self) -> None:
        """Delete scans, the one used longest ago first, until the others take no more than LARGEST bytes; nothing else."""
        scans = [path for path in self.folder.parent.iterdir() if re.fullmatch("[0-9a-f]{32}", path.name)]
        others = sorted(scans, key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for folder in (self.folder, *(path for path in others if path.is_dir() and path != self.folder)):
            total += sum(file.stat().st_size for file in folder.iterdir())
            if total > LARGEST and folder != self.folder:
                shutil.rmtree(folder, ignore_errors=True)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as stream:
        while part := stream.read(1 << 20):
            value = zlib.crc32(part, value)
    return value
