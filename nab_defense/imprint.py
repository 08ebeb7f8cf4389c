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

__all__ = ["imprint_by_class", "imprints", "picked"]


def imprints(
    model: nn.Module, batches: Batches, labels: NDArray[np.int64], groups: Sequence[NDArray[np.bool_]], *, runtime: Runtime
) -> list[float]:
    """What each group shares, added to images of other classes: how many turn to the group's class?

    A clean-label trigger cannot be seen on its own images, whose content agrees with their label. What the group shares beyond
    any content estimates the trigger, without truth; on a harmless group it is only a faint image.

    Args:
        model: A network, or a DefendedModel; normalised batches.
        batches: (images, labels) of the whole scanned source, in order; gone through twice, however many groups there are.
        labels: (N,) given labels.
        groups: (N,) bool each, samples of one class; no sample is in two.

    Returns: For each group the rise of the share of other images given its label, in [-1, 1]."""
    if not groups:
        return []
    goals = [int(labels[group][0]) for group in groups]
    patterns = beyond_content(batches, labels, groups, together=False)
    rises = _rises(model, batches, labels, goals, patterns, shown=np.ones(len(labels), bool), runtime=runtime)
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
    """The rise on the images of each class alone: a trigger may work on one.

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
    """(G, K): imprint_by_class of G patterns, in one pass."""
    device, classes = runtime.torch_device, int(labels.max()) + 1
    model.eval()
    patterns, shown = patterns.to(device), shown & ~np.all([labels == goal for goal in goals], axis=0)
    risen = torch.zeros(len(goals), classes, dtype=torch.int64, device=device)  # summed there, so that no batch waits for it
    for images, rows in picked(batches, shown, runtime):
        if not len(images):
            continue
        with runtime.autocast():
            named = model(images).argmax(1)
        for place, goal in enumerate(goals):
            others = np.flatnonzero(labels[rows] != goal)
            if not len(others):
                continue
            chosen = torch.from_numpy(others).to(device, non_blocking=True)
            with runtime.autocast():
                after = model(images[chosen] + patterns[place]).argmax(1) == goal
            own = torch.from_numpy(labels[rows][others]).to(device, non_blocking=True)
            risen[place].index_add_(0, own, after.long() - (named[chosen] == goal).long())
    totals = np.array(ranks.total(*risen.flatten().tolist()), dtype=np.float64).reshape(len(goals), classes)
    counts = np.stack([np.bincount(labels[shown & (labels != goal)], minlength=classes) for goal in goals])
    return totals / counts.clip(min=1)


def picked(batches: Batches, mask: NDArray[np.bool_], runtime: Runtime) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Of each batch the images in the mask, none or more, on the device, and their rows; each rank has batches of its own.

    Picked where they lie by numbers that are known here: a mask on a GPU would make it wait to learn how many there are."""
    for first, images, _ in ranks.deal(batches):
        rows = np.flatnonzero(mask[first : first + len(images)])
        places = torch.from_numpy(rows)
        yield runtime.put(images[places.to(images.device, non_blocking=True)]), first + rows
