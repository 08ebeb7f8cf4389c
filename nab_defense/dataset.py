"""NABDataset: the drop-in wrapper that relabels, stamps and drops what a plan says, after every transform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.datasets.vision import StandardTransform

from .stamp import Patch, Stamp
from .types import NABPlan

__all__ = ["NABDataset"]

BEYOND = 0.1  # [0, 1], by which resizing may go


def _normalizes(transform: Any) -> bool:
    """Whether a transform pipeline (torchvision v1 or v2, timm, albumentations) holds a step that normalises."""
    if type(transform).__name__ == "Normalize":
        return True
    steps = getattr(transform, "transforms", None) or (transform.children() if isinstance(transform, nn.Module) else ())
    return any(_normalizes(step) for step in steps)


def _like(label: Any, new: int) -> Any:
    """Another label of the same type and shape; some data sets give arrays or tensors."""
    if isinstance(label, Tensor):
        return torch.full_like(label, new)
    return np.full_like(label, new) if isinstance(label, np.ndarray) else type(label)(new)


class NABDataset(Dataset[Any]):
    """Wraps a map-style data set of (image, label) so that training sees the plan [NAB, arXiv:2307.15539, section 4].

    The image must leave the wrapped data set as a tensor or array: uint8 (as timm's prefetcher takes it), float in
    [0, 1], or normalised. Stamping comes last, so no crop, flip or erasing moves it. With an empty plan every item
    passes through untouched.

    Args:
        dataset: What to wrap; its `transform` stays settable, as timm's create_loader needs.
        plan: Made for this data set.
        stamp: What to paint.
        mean, std: The normalisation of the model, in [0, 1] units.
        normalized: Whether float images are normalised; None looks for a Normalize step in the transform, and refuses images
            without one whose values say otherwise.

    Raises:
        ValueError: Plan and data set differ in length or fingerprint, or the plan has one and the data set, which may have
            another order, has not; while loading: a sample's label is not the one that was scanned, or an image is neither an
            array nor a tensor.
    """

    def __init__(
        self,
        dataset: Any,
        plan: NABPlan,
        stamp: Stamp,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        normalized: bool | None = None,
    ) -> None:
        plan.check_matches(len(dataset), getattr(dataset, "fingerprint", ""))
        self.dataset = dataset
        self.plan = plan
        self.stamp = stamp
        self.mean, self.std = tuple(mean), tuple(std)
        self.normalized = normalized
        self._order = np.flatnonzero(plan.keep)
        self._stamped, self._touched = plan.stamped, plan.suspect | plan.stamped
        self._patches: dict[tuple[torch.Size, torch.dtype], tuple[Patch, bool]] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        position = int(self._order[index])
        return self._planned(position, self.dataset[position])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, ...]]:
        """A batch, as torch's loader asks for it. All images are loaded first and stamped then: between two loads the code that
        stamps has left the processor's caches, and stamping one by one takes two to three times as long."""
        positions: list[int] = self._order[indices].tolist()
        load = getattr(self.dataset, "__getitems__", None)
        items = [self.dataset[position] for position in positions] if load is None else load(positions)
        return [self._planned(position, item) for position, item in zip(positions, items, strict=True)]

    def _planned(self, position: int, item: tuple[Any, ...]) -> tuple[Any, ...]:
        """An item of the wrapped data set as the plan wants it."""
        image, label, *rest = item
        given = int(label.item() if isinstance(label, np.ndarray) else label)
        if given != self.plan.labels.item(position):
            raise ValueError(
                f"sample {position} came with label {given}, the plan saw {self.plan.labels[position]}: "
                "the data set changed, or replaced an unreadable file by another; scan again"
            )
        if not self._touched.item(position):
            return item if type(item) is tuple else (image, label, *rest)
        if self.plan.suspect.item(position):
            label = _like(label, self.plan.new_labels.item(position))
        if self._stamped.item(position):
            image = self._paint(image)
        return (image, label, *rest)

    def _paint(self, image: Any) -> Any:
        if isinstance(image, np.ndarray):  # CHW, as timm's ToNumpy gives it
            return self._paint(torch.from_numpy(image)).numpy()
        if not isinstance(image, Tensor):
            raise ValueError(f"cannot stamp a {type(image).__name__}; end the transform in a tensor, e.g. with PILToTensor()")
        key = (image.shape, image.dtype)
        if key not in self._patches:  # one serves all images of a kind
            normalized = self.normalized if self.normalized is not None else _normalizes(self.transform)
            patch = self.stamp.fitted(image, mean=self.mean, std=self.std, normalized=normalized)
            self._patches[key] = patch, image.is_floating_point() and self.normalized is None and not normalized
        patch, guessed = self._patches[key]
        if guessed and not -BEYOND <= float(image.min()) <= float(image.max()) <= 1 + BEYOND:
            raise ValueError(
                f"an image has values from {image.min():.2f} to {image.max():.2f}, and there is no Normalize in the data set's "
                "transform: give NABDataset normalized=True, or the stamp has another color than at inference"
            )
        return patch.paint(image)

    @property
    def transform(self) -> Callable[[Any], Any] | None:
        return getattr(self.dataset, "transform", None)

    @transform.setter
    def transform(self, transform: Callable[[Any], Any] | None) -> None:
        self._patches.clear()  # another transform may normalise where this one did not
        self.dataset.transform = transform
        if hasattr(self.dataset, "transforms"):
            # some of torchvision's data sets read .transforms and ignore .transform (timm issue 1216)
            self.dataset.transforms = StandardTransform(transform, getattr(self.dataset, "target_transform", None))

    def filename(self, index: int, *args: Any, **kwargs: Any) -> str:
        return str(self.dataset.filename(int(self._order[index]), *args, **kwargs))

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
