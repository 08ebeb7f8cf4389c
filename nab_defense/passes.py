"""What several looks of one network at the data say together."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from .select import BALANCED, CLEAR_IMPRINT, Group, Selection

__all__ = ["JUDGES", "clear", "clearest", "confirmed", "judged", "overfull", "settled"]

JUDGES = 3  # passes at the end of a scan that judge a group in doubt
SETTLED = 0.98  # overlap of two passes, intersection over union


def settled(before: Selection, after: Selection) -> bool:
    """Whether two passes accuse (nearly) the same samples, and any at all."""
    either = before.suspect | after.suspect
    return bool(either.any() and (before.suspect & after.suspect).sum() >= SETTLED * either.sum())


def confirmed(
    selection: Selection,
    labels: NDArray[np.int64],
    imprints: dict[int, float],
    *,
    known: NDArray[np.bool_] | None = None,
) -> Selection:
    """Let go the groups that share no trigger, beyond doubt where one is most of its class; their doubt stays.

    Args:
        selection: What stands apart.
        labels: (N,) as given.
        imprints: Of each label with suspects, the share of other images that they turn.
        known: (N,) bool, suspects that stay whatever their label's imprint."""
    suspect, groups = selection.suspect.copy(), []
    for group in selection.groups:
        members = (labels == group.label) & ~(np.zeros_like(suspect) if known is None else known)
        share = float(suspect[members].mean()) if members.any() else 0.0
        group = dataclasses.replace(group, imprint=imprints.get(group.label), share=share)
        if group.acquitted:
            suspect[members] = False
        groups.append(group)
    return Selection(suspect, selection.doubt, tuple(groups))


def clearest(selection: Selection, labels: NDArray[np.int64], passes: list[Selection]) -> Selection:
    """With each group that was let go as it was where it stood apart most, by its separation times the valley beside it: grown
    anew on each pass, it may end with half of the rest of its class.

    Args:
        selection: After the last of the passes.
        labels: (N,) as given."""
    doubt, groups = selection.doubt.copy(), []
    for group in selection.groups:
        if group.acquitted:
            best, of = max(_apart(passes, group.label), key=lambda pair: pair[0].separation * pair[0].valley)
            members = labels == group.label
            doubt[members] = of.doubt[members]
            group = dataclasses.replace(best, imprint=group.imprint, share=group.share)
        groups.append(group)
    return Selection(selection.suspect, doubt, tuple(groups))


def _apart(passes: list[Selection], label: int) -> list[tuple[Group, Selection]]:
    """The groups of a class that stood apart and were not accused, each with what its pass showed."""
    every = [(group, of) for of in passes for group in of.groups if group.label == label]
    return [(g, of) for g, of in every if g.distinct and not g.foreign and (g.imprint is None or g.acquitted)]


def clear(imprints: dict[int, float]) -> bool:
    """Whether there are groups, and all of them share a trigger beyond doubt."""
    return min(imprints.values(), default=0.0) >= CLEAR_IMPRINT


def overfull(suspect: NDArray[np.bool_], labels: NDArray[np.int64]) -> bool:
    """Whether so much of a class is accused that it may be the clean part; (N,) each."""
    counts = np.bincount(labels)
    return bool((np.bincount(labels[suspect], minlength=len(counts)) > (1 - BALANCED) * counts).any())


def judged(tried: list[dict[int, float]]) -> dict[int, float]:
    """One imprint for each label from those of several passes: the last pass's if it is clear, else the median of the last ones;
    0 on a pass that suspects nobody of this label.

    Args: tried: Pass by pass, at least one; label -> imprint."""
    if clear(tried[-1]):
        return tried[-1]
    return {label: float(np.median([seen.get(label, 0.0) for seen in tried[-JUDGES:]])) for label in tried[-1]}
