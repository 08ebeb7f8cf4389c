"""timm's loader, with our transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data import create_loader

from ..runtime import Runtime
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
) -> Any:
    """timm's create_loader with its prefetcher: batches of normalised floats (B, C, size, size) and int64 labels.

    Args:
        dataset: Map-style, with a settable `transform`; one loader owns it from now on.
        transform: PIL image -> (C, size, size) uint8.
        size: Edge in pixels.
        batch_size: Images a batch; a training set with fewer gives one batch of all.
        mean, std: Normalisation, in [0, 1] units.
        training: Shuffle, and drop the incomplete last batch (BatchNorm fails on a batch of one).
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
    dataset.transform = transform
    return loader
