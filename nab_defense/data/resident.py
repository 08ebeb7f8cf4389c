"""Batches of images held on the device: cropped, flipped, distorted, stamped and normalised all at once, for small images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from .. import ranks
from ..clean import crop_flip
from ..runtime import Runtime
from ..stamp import Stamp
from ..types import NABPlan
from .distort import Distortion, distorted
from .sources import Source
from .store import Held
from .transforms import crop_padding

__all__ = ["ResidentLoader", "draw_crop_flip"]

FLOAT_BITS = 24  # of a draw that torch.rand makes a float32 of
Draws = tuple[Tensor, ...]  # top, left, flip, factors, holes; the last axis of each is the batch's


def draw_crop_flip(
    count: int, *, pad: int, hflip: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw crops and flips: top and left (count,) int64 in 0..2 * pad, flip (count,) bool; from torch's own generator by default.

    Up to a padding of 7 px these are the draws of torchvision's RandomCrop and RandomHorizontalFlip, image by image: each takes
    one number of 32 bits, which randint reduces by a remainder and rand by its last 24 bits. So a range that is a multiple of
    both serves all three in one call. From 8 px on randint takes more bits, and only the distribution is theirs."""
    spans = 2 * pad + 1
    # RandomCrop draws nothing where there is nothing to crop.
    raw = torch.randint(spans << FLOAT_BITS, (count, 3 if pad else 1), generator=generator)
    flip = (raw[:, -1] % (1 << FLOAT_BITS)).float() / (1 << FLOAT_BITS) < hflip
    top, left = (raw[:, :2] % spans).unbind(1) if pad else torch.zeros(2, count, dtype=torch.int64).unbind()
    return top, left, flip


class ResidentLoader:
    """What build_loader gives, from images held on the device: the same batches, bit for bit.

    That holds without augmentation, and with crop_flip for the draws of a loader without processes of its own, see
    draw_crop_flip. Everything is drawn from torch's generator when a pass begins and while it goes on.

    Args:
        source: Labels, and what the plan was made for.
        held: Images, of this source or of more.
        rows: (N,) int64, the source's images among those held.
        augment: "none" or "crop_flip".
        batch_size: Images a batch; a training set with fewer gives one batch of all.
        mean, std: Normalisation, in [0, 1] units.
        runtime: Device and memory format.
        training: Shuffle, and drop the incomplete last batch (BatchNorm fails on a batch of one).
        hflip: Probability of a flip in crop_flip.
        distortion: What crop_flip does to images besides; of a batch at once it draws other numbers than image by image.
        split: Of several ranks, give each its part of every batch: of the order and the draws of a single process.
        stamp: What the plan paints.
        plan: What training changes; None: nothing.

    Raises:
        ValueError: Plan and source differ in length, fingerprint or labels.
    """

    def __init__(
        self,
        source: Source,
        held: Held,
        rows: NDArray[np.int64],
        *,
        augment: str,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        runtime: Runtime,
        training: bool = False,
        hflip: float = 0.5,
        distortion: Distortion = Distortion(),  # noqa: B008  # it is frozen
        split: bool = False,
        stamp: Stamp,
        plan: NABPlan | None = None,
    ) -> None:
        plan = NABPlan.empty(source.labels) if plan is None else plan
        plan.check_matches(len(source), source.fingerprint)
        if not np.array_equal(plan.labels, source.labels):
            raise ValueError("the plan saw other labels than the data set has now; scan again")
        kept = np.flatnonzero(plan.keep)
        self.held, self.runtime, self.split = held, runtime, split and ranks.count() > 1
        self.hflip, self.distortion = hflip, distortion
        self.pad = crop_padding(held.size) if augment == "crop_flip" else None
        device = runtime.torch_device
        self.rows = torch.from_numpy(rows[kept]).to(device)
        self.labels = torch.from_numpy(np.where(plan.suspect, plan.new_labels, plan.labels)[kept]).to(device)
        self.stamped = torch.from_numpy(plan.stamped[kept]).to(device).view(-1, 1, 1, 1)
        # For bytes, which are stamped on the way to timm's loader too; normalising then treats all pixels alike.
        blank = torch.empty(held.shape[1:], dtype=torch.uint8, device=device)
        patch = stamp.fitted(blank, mean=mean, std=std, normalized=False)
        self.patch = patch if plan.stamped[kept].any() else None
        # In timm's units and order, for the same bits.
        self.mean, self.std = (torch.tensor([255 * x for x in values], device=device).view(-1, 1, 1) for values in (mean, std))
        # torch's loader, so that the order is the one that timm's would draw.
        self.order = DataLoader(range(len(kept)), min(batch_size, len(kept)), shuffle=training, drop_last=training)  # type: ignore[arg-type, var-annotated]

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        ahead: tuple[Tensor, Draws | None] | None = None
        generator: torch.Generator | None = None
        for picks in self.order:
            if self.split and generator is None:
                # Goes on as torch's own does after the order, and stays alike on all ranks when units are dropped there.
                generator = torch.Generator().set_state(torch.get_rng_state())
            drawn: tuple[Tensor, Draws | None] = picks, None
            if self.pad is not None:
                shifts = draw_crop_flip(len(picks), pad=self.pad, hflip=self.hflip, generator=generator)
                drawn = picks, (*shifts, *self.distortion.draw(len(picks), self.held.size, generator))
            if self.split:
                drawn = _part(*drawn)
            # One batch ahead, as timm's prefetcher is: a network that drops units draws from the same generator.
            if ahead is not None:
                yield self._batch(*ahead)
            ahead = drawn
        if ahead is not None:
            yield self._batch(*ahead)

    def _batch(self, picks: Tensor, draws: Draws | None) -> tuple[Tensor, Tensor]:
        """Normalised images (B, C, S, S) and labels (B,) of these places in the set."""
        device = self.runtime.torch_device
        picks = picks.to(device, non_blocking=True)
        images = self.held.pixels.index_select(0, self.rows[picks])
        if self.pad is not None and draws is not None:
            top, left, flip, factors, holes = (draw.to(device, non_blocking=True) for draw in draws)
            images = distorted(crop_flip(images, self.pad, top, left, flip), factors, holes)
        if self.patch is not None:
            self.patch.paint_some(images, self.stamped[picks])
        # The layout comes last: with the channels innermost the same arithmetic takes twice as long.
        return self.runtime.put(images.float().sub_(self.mean).div_(self.std)), self.labels[picks]


def _part(picks: Tensor, draws: Draws | None) -> tuple[Tensor, Draws | None]:
    """This rank's part of a batch that was drawn."""
    own = ranks.part(len(picks))
    return picks[own], None if draws is None else tuple(draw[..., own] for draw in draws)
