"""timm's loader, with our transforms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import create_loader
from torch.utils.data import DataLoader

from .. import ranks
from ..runtime import Runtime, fixed_seed
from .transforms import Transform

__all__ = ["build_loader"]


def build_loader(
    dataset: Any,
    transform: Transform,
    *,
    size: int,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    runtime: Runtime,
    training: bool = False,
    split: bool = False,
) -> Any:
    """timm's create_loader with its prefetcher: batches of normalised floats (B, C, size, size) and int64 labels.

    Args:
        dataset: Map-style, with a settable `transform`; one loader owns it from now on.
        transform: PIL image -> (C, size, size) uint8.
        size: Edge in pixels.
        batch_size: Images a batch; a training set with fewer gives one batch of all.
        mean, std: Normalisation, in [0, 1] units.
        training: Shuffle, and drop the incomplete last batch (BatchNorm fails on a batch of one).
        split: Of several ranks, give each its part of every batch, in a single process's order, augmented by draws of its own.
    """
    loader = create_loader(
        dataset,
        input_size=(len(mean), size, size),
        batch_size=min(batch_size, len(dataset)),
        is_training=training,
        mean=tuple(mean),
        std=tuple(std),
        num_workers=runtime.workers,
        device=runtime.torch_device,
        pin_memory=runtime.torch_device.type == "cuda",
        # A fresh worker per epoch takes its seed from that epoch's generator; a living one carries state across epochs,
        # and a resumed run would differ.
        persistent_workers=False,
    )
    if split and ranks.count() > 1:
        loader.loader = _parts(loader.loader)
    dataset.transform = transform
    return loader


class _Parts:
    """This rank's places of each batch of a batch sampler."""

    def __init__(self, whole: Iterable[list[int]]) -> None:
        self.whole = whole

    def __len__(self) -> int:
        return len(self.whole)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.whole:
            yield batch[ranks.part(len(batch))]


def _parts(whole: DataLoader[Any]) -> DataLoader[Any]:
    """A loader that reads only this rank's part of each batch; timm's own way of splitting has another order."""
    return DataLoader(
        whole.dataset,
        batch_sampler=_Parts(whole.batch_sampler),  # type: ignore[arg-type]
        num_workers=whole.num_workers,
        collate_fn=whole.collate_fn,
        pin_memory=whole.pin_memory,
        worker_init_fn=partial(_seed_worker, rank=ranks.rank()),
    )


def _seed_worker(worker: int, *, rank: int) -> None:
    """Other draws in each process of each rank: torch gives the same seeds to all ranks."""
    fixed_seed(torch.initial_seed(), rank)
