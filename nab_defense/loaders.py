"""Loaders: batches for every stage of a run, from images held on the device or by timm's loader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .data import ResidentLoader, Source, Store, build_loader, build_transform
from .dataset import NABDataset
from .runtime import Runtime
from .stamp import Stamp
from .types import NABPlan

__all__ = ["Loaders"]


class Loaders:
    """Makes loaders of normalised images (B, C, size, size) and int64 labels (B,), on the runtime's device.

    Small images are held there and shared by all loaders; larger ones, and augmentations that work image by image, are left to
    timm's loader.

    Args:
        size: Edge of the network's input, in pixels.
        mean, std: Its normalisation, in [0, 1] units.
        hflip: Probability of a flip where images are augmented.
        stamp: What plans paint.
        runtime: Device, memory format, loader processes.
    """

    def __init__(
        self, *, size: int, mean: Sequence[float], std: Sequence[float], hflip: float, stamp: Stamp, runtime: Runtime
    ) -> None:
        self.size, self.mean, self.std = size, mean, std
        self.hflip, self.stamp, self.runtime = hflip, stamp, runtime
        self.store = Store(size, runtime.torch_device)

    def __call__(self, source: Source, augment: str, batch_size: int, *, training: bool, plan: NABPlan | None = None) -> Any:
        """Batches of a source.

        Args:
            source: What to read.
            augment: One of AUGMENTATIONS.
            batch_size: Images a batch.
            training: Shuffle, and drop the incomplete last batch.
            plan: What training changes; None: nothing.

        Raises:
            ValueError: The plan was made for another source.
        """
        given: dict[str, Any] = {
            "batch_size": batch_size, "mean": self.mean, "std": self.std, "runtime": self.runtime, "training": training
        }  # fmt: skip
        found = self.store.find(source, augment)
        if found is not None:
            return ResidentLoader(source, *found, augment=augment, hflip=self.hflip, plan=plan, stamp=self.stamp, **given)
        transform = build_transform(augment, self.size, hflip=self.hflip)
        view: Any = source.view()
        if plan is not None:
            view = NABDataset(view, plan, self.stamp, mean=self.mean, std=self.std)
        return build_loader(view, transform, size=self.size, **given)
