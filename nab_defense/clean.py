"""CleanSet: a few images held in memory, given out in batches on the device, and a network that takes pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from .runtime import Runtime

__all__ = ["CleanSet", "Pixels", "crop_flip", "logits_of", "mixed"]

EVAL_BATCH = 256


@dataclass(frozen=True, eq=False)
class CleanSet:
    """Images that are trusted, or at least not known to be poisoned, with or without labels.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64; None: unlabelled.
        pad: Zero padding of the random crop, in pixels.
        hflip: Probability of a horizontal flip in augmented batches.
    """

    images: Tensor
    labels: Tensor | None = None
    pad: int = 4
    hflip: float = 0.5

    @classmethod
    def read(cls, dataset: Dataset[Any], *, labelled: bool = True, hflip: float = 0.5) -> CleanSet:
        """All of a map-style data set of (image (C, H, W) uint8, label), such as a source's view; C * H * W bytes an image."""
        items = [dataset[i] for i in range(len(dataset))]  # type: ignore[arg-type]
        labels = torch.tensor([int(label) for _, label in items]) if labelled else None
        return cls(torch.stack([image for image, _ in items]), labels, pad=items[0][0].shape[-1] // 8, hflip=hflip)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def scale(self) -> float:
        """How much larger the L2 norm of a change is here than at 3 x 32 x 32 pixels, at equal change a pixel."""
        return (self.images[0].numel() / 3072) ** 0.5

    def take(self, rows: Tensor) -> CleanSet:
        return replace(self, images=self.images[rows], labels=None if self.labels is None else self.labels[rows])

    def distinct(self) -> Tensor:
        """The rows of all images but repeats, pixel by pixel, of earlier ones."""
        first = dict[bytes, int]()
        for row, image in enumerate(self.images):
            first.setdefault(hashlib.sha256(image.numpy().tobytes()).digest(), row)
        return torch.tensor(list(first.values()))

    def split(self, fraction: float, seed: int) -> tuple[CleanSet, CleanSet]:
        """Two disjoint parts, the second with `fraction` of each class, at least one image in either; of all, without labels, and
        where a class has one image only."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        groups = [order]
        if self.labels is not None and self.labels.unique(return_counts=True)[1].min() > 1:
            groups = [order[self.labels[order] == k] for k in self.labels.unique()]
        counts = [max(1, min(round(fraction * len(group)), len(group) - 1)) for group in groups]
        second = torch.cat([group[:count] for group, count in zip(groups, counts, strict=True)]).sort().values
        first = torch.cat([group[count:] for group, count in zip(groups, counts, strict=True)]).sort().values
        return self.take(first), self.take(second)

    def batches(
        self, batch_size: int, *, runtime: Runtime, seed: int | None = None, augment: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass: (images (B, C, H, W) float32 in [0, 1], rows (B,) of this set), on the device.

        Args:
            batch_size: Images a batch; a last one of less than half of that joins the one before.
            seed: Of the order and the augmentation; None: in order.
            augment: Random crop and flip.
        """
        generator = torch.Generator().manual_seed(seed or 0)
        order = torch.arange(len(self)) if seed is None else torch.randperm(len(self), generator=generator)
        starts = list(range(0, len(self), batch_size))
        if len(starts) > 1 and len(self) - starts[-1] < batch_size / 2:
            starts.pop()
        for first, last in zip(starts, [*starts[1:], len(self)], strict=True):
            rows = order[first:last]
            images = self.images[rows]
            if augment:
                top, left = torch.randint(0, 2 * self.pad + 1, (2, len(rows)), generator=generator)
                flip = torch.rand(len(rows), generator=generator) < self.hflip
                images = crop_flip(images, self.pad, top, left, flip)
            yield runtime.put(images.float().div_(255)), rows

    def endless(self, batch_size: int, *, runtime: Runtime, seed: int, augment: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """Pass after pass, each in another order."""
        for epoch in range(2**31):
            yield from self.batches(batch_size, runtime=runtime, seed=seed * 100_003 + epoch, augment=augment)


def crop_flip(images: Tensor, pad: int, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Each image cropped to its own size from its zero-padded self, then mirrored where `flip` says so.

    Args:
        images: (N, C, H, W), any type.
        pad: Zeros on each side, in pixels.
        top, left: (N,) int64 in 0..2 * pad, the crop's corner on the padded image.
        flip: (N,) bool.

    Returns: (N, C, H, W), a copy."""
    count, channels, height, width = images.shape
    across = torch.arange(width, device=images.device).expand(count, width)
    columns = torch.where(flip[:, None], across.flip(1), across) + left[:, None]
    rows = torch.arange(height, device=images.device) + top[:, None]
    # gather on flat images: a third of the time that rows and columns as indices take
    places = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).view(count, 1, height * width)
    padded = F.pad(images, (pad,) * 4).flatten(2)
    return padded.gather(2, places.expand(count, channels, height * width)).view(images.shape)


def mixed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (N, C, H, W) with a rectangle of another in it, of any size and place; see CutMix [arXiv:1905.04899]."""
    count, _, height, width = images.shape
    area, down, right = torch.rand(3, count, 1, generator=generator)
    inside = []
    for edge, start in ((height, down), (width, right)):
        length = edge * area.sqrt()
        place = torch.arange(edge) - (start * (edge - length)).floor()
        inside.append((place >= 0) & (place < length))
    shown = (inside[0][:, :, None] & inside[1][:, None, :])[:, None].to(images.device)
    others = images[torch.randperm(count, generator=generator).to(images.device)]
    return torch.where(shown, others, images)


class Pixels(nn.Module):
    """A network that takes pixels in [0, 1]: normalises, then runs the model, whose own module it keeps as `.model`."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(list(mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(-1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, K) of pixels (B, C, H, W) in [0, 1]."""
        logits = self.model((pixels - self.mean) / self.std)
        if not isinstance(logits, Tensor):
            raise ValueError(f"it gives {type(logits).__name__}; wrap it so that it gives logits alone, in training too")
        return logits.float()


@torch.no_grad()
def logits_of(network: nn.Module, clean: CleanSet, runtime: Runtime, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """(N, K) float32 on the CPU, in eval mode; `change` is made to pixels (B, C, H, W) first."""
    network.eval()
    found = []
    for images, _ in clean.batches(EVAL_BATCH, runtime=runtime):
        with runtime.autocast():
            found.append(network(images if change is None else change(images)).float().cpu())
    return torch.cat(found)
