"""Of few classes: a trigger that hides in a class of several styles, found by what it shares beyond how images vary."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from .content import Batches, beyond_content
from .imprint import imprints
from .mixture import split_in_two
from .naming import amounts
from .parts import Part
from .principal import project
from .scan import Scan
from .select import BALANCED, MIN_SEEDS, MIN_SEPARATION, MIN_VALLEY, Group
from .session import Session
from .variation import beyond_variation, reduced

__all__ = ["hidden"]

log = logging.getLogger(__name__)
ROUNDS = 5  # of who shows what the group shares, and what those share

Mask = NDArray[np.bool_]


def hidden(session: Session, trained: nn.Module, scan: Scan, aside: Mask, directions: dict[int, Tensor]) -> list[Part]:
    """Of each class those who show a pattern that sets them apart, and what it does to other images.

    Where there are few classes, each holds many contents, falls in two by these, and its poison stands with some of them. So
    each half of a class along its top singular direction, and each half of these, is asked who of the class shows what it
    shares beyond how images vary, and what these share, a few times over: of a few that are poison all become so, and of harmless
    images nobody stands apart.

    Args:
        session: The run.
        trained: A network that was trained on all of it.
        scan: What it saw.
        aside: (N,) bool, samples that are accused, and left aside.
        directions: In which images vary, see variation.variation.

    Held are all images, reduced to 32 pixels a side, at two bytes a value: .6 GB for 100,000 in color.

    Returns: of each class where some show it, and turn enough, those that turn most, with what they turn in `beyond`, and for
        each sample (N,) the probability of showing it."""
    labels = scan.labels
    held = [(reduced(images).half().cpu(), targets) for images, targets in session.ordered(session.source)]
    starts = {label: _starts(scan, (labels == label) & ~aside) for label in directions}
    best: dict[int, Part] = {}
    for turn in range(max(map(len, starts.values()), default=0)):
        groups = {label: masks[turn] for label, masks in starts.items() if turn < len(masks)}
        parts = _who_shows(held, labels, aside, groups, directions)
        masks, batches = [likely > 0.5 for _, likely in parts], session.ordered(session.source)
        rises = imprints(trained, batches, labels, masks, runtime=session.runtime, directions=directions)
        for (group, likely), rise in zip(parts, rises, strict=True):
            log.info("class %d: %d show a pattern, which turns %.2f", group.label, group.size, rise)
            if group.label not in best or rise > (best[group.label][0].beyond or 0.0):
                best[group.label] = dataclasses.replace(group, beyond=rise), likely
    return [part for part in best.values() if part[0].foreign]


def _starts(scan: Scan, members: Mask) -> list[Mask]:
    """The halves of a class, and the halves of these; (N,) bool each, those that are large enough."""
    halves = _halves(scan, members)
    quarters = [quarter for half in halves for quarter in _halves(scan, half)]
    return [part for part in (*halves, *quarters) if part.sum() >= MIN_SEEDS]


def _halves(scan: Scan, members: Mask) -> list[Mask]:
    rows, upper = np.flatnonzero(members), np.zeros_like(members)
    if len(rows) < 2 * MIN_SEEDS:
        return []
    upper[rows] = split_in_two(project(scan.features, rows, 1)[:, 0])[0] > 0.5
    return [upper, members & ~upper]


def _who_shows(
    held: Batches, labels: NDArray[np.int64], aside: Mask, groups: dict[int, Mask], directions: dict[int, Tensor]
) -> list[Part]:
    """From a group of each class to those who show what it shares, where they stood apart most."""
    best: dict[int, Part] = {}
    for _ in range(ROUNDS):
        if not groups:
            break
        given, masks = list(groups), list(groups.values())
        patterns = beyond_variation(beyond_content(held, labels, masks, together=False), given, directions)
        rows = zip(given, masks, amounts(held, labels, masks, patterns), strict=True)
        groups = {}
        for label, mask, much in rows:
            own = (labels == label) & ~aside
            everyone = np.zeros(len(labels))
            everyone[own], separation, valley = split_in_two(much[own], means=(0, 1))
            size = int((everyone > 0.5).sum())
            if not MIN_SEEDS <= size <= own.sum() - MIN_SEEDS:
                continue
            if not np.array_equal(everyone > 0.5, mask):
                groups[label] = everyone > 0.5
            apart = separation > MIN_SEPARATION and valley > MIN_VALLEY and size <= (1 - BALANCED) * own.sum()
            if apart and (label not in best or valley > best[label][0].valley):
                best[label] = Group(label, 0, separation, valley, size, 0.0, few=True), everyone
    return list(best.values())
