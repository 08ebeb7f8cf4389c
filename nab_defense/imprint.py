"""What a group of one class shares, added to other images: how many does it turn?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import ranks
from .content import Batches, beyond_content
from .runtime import Runtime
from .variation import beyond_variation

__all__ = ["imprint_by_class", "imprints", "picked"]

OTHERS = 20_000  # images of other classes that groups are tried on: the share that turns is known to .007, two standard errors


def imprints(
    model: nn.Module,
    batches: Batches,
    labels: NDArray[np.int64],
    groups: Sequence[NDArray[np.bool_]],
    *,
    runtime: Runtime,
    directions: dict[int, Tensor] | None = None,
) -> list[float]:
    """What each group shares, added to images of other classes: how many turn to the group's class?

    A clean-label trigger cannot be seen on its own images, whose content agrees with their label. What the group shares beyond
    any content estimates the trigger, without truth; on a harmless group it is only a faint image.

    Args:
        model: A network, or a DefendedModel; normalised batches.
        batches: (images, labels) of the whole scanned source, in order; gone through twice, however many groups there are.
        labels: (N,) given labels.
        groups: (N,) bool each, samples of one class; no sample is in two.
        runtime: Where to compute.
        directions: In which the images of the others vary (see variation.variation): only what each group shares beyond that is
            added. None: all of it.

    Returns: For each group the rise of the share of other images given its label, in [-1, 1]; where there are more than OTHERS,
        estimated from at least so many, see _some."""
    if not groups:
        return []
    goals = [int(labels[group][0]) for group in groups]
    patterns = beyond_content(batches, labels, groups, together=False)
    if directions is not None:
        patterns = beyond_variation(patterns, goals, directions)
    rises = _rises(model, batches, labels, goals, patterns, shown=_some(labels), runtime=runtime)
    counts = np.bincount(labels, minlength=rises.shape[1])
    return [
        float(np.delete(rise, goal) @ np.delete(counts, goal) / max(1, len(labels) - counts[goal]))
        for rise, goal in zip(rises, goals, strict=True)
    ]


def imprint_by_class(
    model: nn.Module,
    batches: Batches,
    labels: NDArray[np.int64],
    label: int,
    pattern: Tensor,
    *,
    shown: NDArray[np.bool_],
    runtime: Runtime,
) -> NDArray[np.float64]:
    """The rise on the images of each class alone: a trigger may work on one. On all of them, since the most of many shares that
    are known from few images is a large one by chance.

    Args:
        model, batches, labels: As in imprints; the batches are gone through once.
        label: The group's.
        pattern: (C, H, W), what the group shares, see content.beyond_content.
        shown: (N,) bool, which images it is added to.

    Returns: (K,) rises in [-1, 1]; 0 for the group's own class, and where no image is shown."""
    rises: NDArray[np.float64] = _rises(model, batches, labels, [label], pattern[None], shown=shown, runtime=runtime)[0]
    return rises


@torch.inference_mode()
def _rises(
    model: nn.Module,
    batches: Batches,
    labels: NDArray[np.int64],
    goals: Sequence[int],
    patterns: Tensor,
    *,
    shown: NDArray[np.bool_],
    runtime: Runtime,
) -> NDArray[np.float64]:
    """(G, K): imprint_by_class of G patterns, in one pass; where few of a batch are shown, with several patterns at once."""
    device, classes, targets = runtime.torch_device, int(labels.max()) + 1, np.array(goals)
    model.eval()
    patterns, wanted = patterns.to(device), shown & ~np.all([labels == goal for goal in goals], axis=0)
    risen = torch.zeros(len(goals) * classes, dtype=torch.int64, device=device)  # summed there, so that no batch waits for it
    for first, batch, _ in ranks.deal(batches):
        images, rows = _taken(first, batch, wanted, runtime)
        if not len(images):
            continue
        with runtime.autocast():
            named = model(images).argmax(1)
        at_once = len(batch) // int(shown[first : first + len(batch)].sum())  # groups; no more images than the batch has
        for start in range(0, len(goals), at_once):
            places, others = np.nonzero(targets[start : start + at_once, None] != labels[rows])
            if not len(others):
                continue
            places += start
            cells = places * classes + labels[rows[others]]
            place, chosen, goal, cell = (
                torch.from_numpy(array).to(device, non_blocking=True) for array in (places, others, targets[places], cells)
            )
            with runtime.autocast():
                after = model(images[chosen] + patterns[place]).argmax(1) == goal
            risen.index_add_(0, cell, after.long() - (named[chosen] == goal).long())
    totals = np.array(ranks.total(*risen.tolist()), dtype=np.float64).reshape(len(goals), classes)
    counts = np.stack([np.bincount(labels[wanted & (labels != goal)], minlength=classes) for goal in goals])
    return totals / counts.clip(min=1)


def _some(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N,) bool, always the same images: of each class the same share, at least one image and at most OTHERS, so that OTHERS or
    more are left without any one class; all, where there are no more than that."""
    counts = np.bincount(labels)
    share = min(1.0, OTHERS / max(1, len(labels) - counts.max()))
    enough = np.minimum(np.ceil(share * counts), OTHERS)
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    turn = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # of each among its class
    some = np.zeros(len(labels), dtype=bool)
    some[order[turn < enough[labels[order]]]] = True
    return some


def picked(batches: Batches, mask: NDArray[np.bool_], runtime: Runtime) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Of each batch the images in the mask, none or more, on the device, and their rows; each rank has batches of its own.

    Picked where they lie by numbers that are known here: a mask on a GPU would make it wait to learn how many there are."""
    for first, images, _ in ranks.deal(batches):
        yield _taken(first, images, mask, runtime)


def _taken(first: int, images: Tensor, mask: NDArray[np.bool_], runtime: Runtime) -> tuple[Tensor, NDArray[np.int64]]:
    """See picked; of the batch that begins at row `first`."""
    rows = np.flatnonzero(mask[first : first + len(images)])
    places = torch.from_numpy(rows)
    return runtime.put(images[places.to(images.device, non_blocking=True)]), first + rows
