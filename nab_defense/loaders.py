"""Loaders: batches for every stage of a run, from images held on the device or by timm's loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from . import ranks
from .data import Distortion, Held, ResidentLoader, Source, Store, build_loader, build_transform
from .dataset import NABDataset
from .runtime import Runtime
from .stamp import Stamp
from .types import NABPlan

__all__ = ["Loaders", "Ordered"]


class Loaders:
    """Makes loaders of normalised images (B, C, size, size) and int64 labels (B,), on the runtime's device.

    Small images are held there and shared by all loaders; larger ones, those that memory has no room for, and augmentations that
    work image by image, are left to timm's loader. Both give the same batches, except where crop_flip takes images of 64 px,
    distorts them, or is done by loader processes: there the two draw other numbers. So what was decided for training is kept for
    a resumed run, and the first of several ranks decides.

    Args:
        size: Edge of the network's input, in pixels.
        mean, std: Its normalisation, in [0, 1] units.
        hflip: Probability of a flip where images are augmented.
        distortion: What crop_flip does to images besides.
        stamp: What plans paint.
        runtime: Device, memory format, loader processes.
    """

    def __init__(
        self,
        *,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        hflip: float,
        distortion: Distortion = Distortion(),  # noqa: B008  # it is frozen
        stamp: Stamp,
        runtime: Runtime,
    ) -> None:
        self.size, self.mean, self.std = size, mean, std
        self.augmenting: dict[str, Any] = {"hflip": hflip, "distortion": distortion}
        self.stamp, self.runtime = stamp, runtime
        self.store = Store(size, runtime.torch_device)

    def __call__(
        self,
        source: Source,
        augment: str,
        batch_size: int,
        *,
        training: bool,
        plan: NABPlan | None = None,
        split: bool = False,
    ) -> Any:
        """Batches of a source; of several ranks, batches in order can be dealt out, see Ordered.

        Args:
            source: What to read.
            augment: One of AUGMENTATIONS.
            batch_size: Images a batch.
            training: Shuffle, and drop the incomplete last batch.
            plan: What training changes; None: nothing.
            split: Of several ranks, give each its part of every training batch.

        Raises:
            ValueError: The plan was made for another source, or the batches are too small to be split.
        """
        if split:
            ranks.check_batch(min(batch_size, len(source) if plan is None else int(plan.keep.sum())))
        found = self.store.settle(source, augment) if training else self.store.find(source, augment)
        made = self._made(source, found, augment, batch_size, training, plan, split)
        if training or ranks.count() == 1:
            return made

        def part(rows: NDArray[np.int64]) -> Any:
            own = None if found is None else (found[0], found[1][rows])
            return self._made(source.subset(rows), own, augment, batch_size, False, None, False)

        return Ordered(made, len(source), batch_size, part)

    def _made(
        self,
        source: Source,
        found: tuple[Held, NDArray[np.int64]] | None,
        augment: str,
        batch_size: int,
        training: bool,
        plan: NABPlan | None,
        split: bool,
    ) -> Any:
        given: dict[str, Any] = {
            "batch_size": batch_size, "mean": self.mean, "std": self.std, "runtime": self.runtime,
            "training": training, "split": split,
        }  # fmt: skip
        if found is not None:
            held, rows = found
            given |= {"augment": augment, "plan": plan, "stamp": self.stamp, **self.augmenting}
            return ResidentLoader(source, held, rows, **given)
        transform = build_transform(augment, self.size, **self.augmenting)
        view: Any = source.view()
        if plan is not None:
            view = NABDataset(view, plan, self.stamp, mean=self.mean, std=self.std)
        return build_loader(view, transform, size=self.size, **given)


class Ordered:
    """The batches of a source in order, which can be dealt out to ranks.

    Args:
        whole: All of them.
        samples: Images in the source.
        batch_size: Images in each batch but the last.
        make: Places in the source -> batches of these images.
    """

    def __init__(self, whole: Any, samples: int, batch_size: int, make: Callable[[NDArray[np.int64]], Any]) -> None:
        self.whole, self.samples, self.batch_size, self.make = whole, samples, batch_size, make

    def __len__(self) -> int:
        return len(self.whole)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.whole)

    def dealt(self, rank: int, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Every count-th batch, with the place where it begins; the images of the others are not read."""
        places = np.arange(self.samples)
        own = places[places // self.batch_size % count == rank]
        for index, (images, labels) in enumerate(self.make(own) if len(own) else ()):
            yield int(own[index * self.batch_size]), images, labels
