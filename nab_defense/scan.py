"""Scan: what one ordered pass of a network over a source sees."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from . import ranks
from .io import cache_folder
from .runtime import Runtime, evaluating

__all__ = ["EarlyScan", "Scan", "features_and_logits", "room_for", "scan_model"]

Batches = Iterable[tuple[Tensor, Tensor]]
LOSSES = 2**24  # logits at once
HELD = 2**28  # bytes; larger arrays of a scan lie in a file


@dataclass(frozen=True, eq=False)
class Scan:
    """Labels and what a network made of every sample, in the source's order.

    Args:
        labels: (N,) int64, as they came with the data.
        losses: (N,) float32, cross-entropy of the given label, >= 0.
        logits: (N, K) float32.
        features: (N, D) float32, the pooled input of the classifier; a memory-mapped file where they are large.
        fingerprint: Fingerprint of the source.
        epoch: Which epoch losses, logits and features were read after, from 1; 0: a finished network.
    """

    labels: NDArray[np.int64]
    losses: NDArray[np.float32]
    logits: NDArray[np.float32]
    features: NDArray[np.float32]
    fingerprint: str = ""
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return int(self.logits.shape[1])


def features_and_logits(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features (B, D) and logits (B, K) of any timm network, without naming a layer."""
    stream = model.forward_features(images)  # type: ignore[operator]
    return model.forward_head(stream, pre_logits=True), model.forward_head(stream)  # type: ignore[operator]


@torch.inference_mode()
def scan_model(model: nn.Module, loader: Batches, labels: NDArray[np.int64], *, runtime: Runtime, fingerprint: str = "") -> Scan:
    """One pass of a network, in eval mode, over a loader that goes through a source in order. Of several ranks, each computes
    some of the batches.

    Args:
        model: A timm network.
        loader: Batches of (images, labels), not shuffled, without augmentation, last batch included.
        labels: (N,) labels of the source; the loader must agree with them.
        runtime: Device and precision.
        fingerprint: Fingerprint of the source.

    Raises:
        ValueError: The loader's labels differ from the source's: shuffled, shortened, or a sample was replaced.
    """
    size, first = len(labels), 0
    losses, seen = np.empty(size, dtype=np.float32), np.empty(size, dtype=np.int64)
    features = logits = np.empty((0, 0), dtype=np.float32)
    with evaluating(model):
        for batch_features, batch_logits, targets in _batch_by_batch(model, loader, runtime):
            if first == 0:
                shapes = (batch_features.shape[1], batch_logits.shape[1])
                features, logits = (room_for(size, width, np.float32, "features") for width in shapes)
            rows = slice(first, first + len(targets))
            first = rows.stop
            if first > size:
                break
            seen[rows], logits[rows], features[rows] = targets.numpy(), batch_logits.numpy(), batch_features.numpy()
    if first != size or not np.array_equal(seen, labels):
        raise ValueError("the loader does not give the source's samples in order; use one without shuffling and with all samples")
    step = max(1, LOSSES // max(1, logits.shape[1]))
    for first in range(0, size, step):
        rows = slice(first, first + step)
        found = F.cross_entropy(torch.from_numpy(logits[rows]), torch.from_numpy(seen[rows]), reduction="none")
        losses[rows] = found.numpy()
    return Scan(labels, losses, logits, features, fingerprint)


def _batch_by_batch(model: nn.Module, loader: Batches, runtime: Runtime) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Features, logits and labels of all batches, in order, on the CPU; of several ranks each computes one a round, and no rank
    holds more than a round."""

    def dealt() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for _, images, targets in ranks.deal(loader):
            with runtime.autocast():
                features, logits = features_and_logits(model, runtime.put(images))
            yield features.float().cpu(), logits.float().cpu(), targets.cpu()

    if ranks.count() == 1:
        yield from dealt()
        return
    own, last = dealt(), False
    while not last:
        batch = next(own, None)
        heard = [ranks.in_order([] if batch is None else [batch[part]]) for part in range(3)]
        yield from zip(*heard, strict=True)
        last = len(heard[0]) < ranks.count()


def room_for(size: int, width: int, kind: type[np.floating[Any]], what: str) -> NDArray[Any]:
    """An empty (size, width) array of such values; above HELD bytes a file that is gone with it, so that memory stays bounded.

    Raises:
        ValueError: There is no room for the file."""
    count = np.dtype(kind).itemsize * size * width
    if count <= HELD:
        return np.empty((size, width), dtype=kind)
    folder = cache_folder("scans")
    with tempfile.TemporaryFile(dir=folder) as stream:
        try:
            if hasattr(os, "posix_fallocate"):  # else a disk that is full later ends the process without a word
                os.posix_fallocate(stream.fileno(), 0, count)
        except OSError as error:
            mend = "make room there, or have NAB_CACHE name a folder on another disk"
            raise ValueError(f"{folder} has no room for {count / 1e9:.1f} GB of {what} ({error.strerror}); {mend}") from None
        return np.memmap(stream, dtype=kind, mode="w+", shape=(size, width))


class EarlyScan:
    """Watches a network train: an ordered pass after each epoch, until what it shows is settled.

    When poison stands apart depends on the attack: on CIFAR-10 with 10 % BadNets the lowest 5 % of losses are all poison
    after epochs 3 to 5 and hardly any are after epochs 1 and 2. So when to read is decided by what the data shows.

    Args:
        loader: Ordered batches of the source, without augmentation.
        labels: (N,) labels of the source.
        look: Called with each pass; true ends the scan.
        runtime: Device and precision.
        fingerprint: Fingerprint of the source.
    """

    def __init__(
        self, loader: Batches, labels: NDArray[np.int64], *, look: Callable[[Scan], bool], runtime: Runtime, fingerprint: str
    ) -> None:
        self.loader, self.labels, self.look = loader, labels, look
        self.runtime, self.fingerprint = runtime, fingerprint
        self.last: Scan | None = None

    def __call__(self, model: nn.Module, epoch: int) -> bool:
        """To be called after each epoch, counted from 1. Returns: whether to stop training."""
        seen = scan_model(model, self.loader, self.labels, runtime=self.runtime, fingerprint=self.fingerprint)
        if not np.isfinite(seen.losses).all():
            raise ValueError(f"the scan's loss is not finite after epoch {epoch}; lower scan.lr")
        self.last = dataclasses.replace(seen, epoch=epoch)
        return self.look(self.last)
