"""Triggers that hide: in a class of several styles, or in one that does not fall in two, found by who shows them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Container, Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from .content import beyond_content
from .imprint import imprints
from .naming import carried
from .parts import MAYBE, Part, distinct
from .scan import Scan
from .select import BALANCED, MIN_SEEDS, SOME_COVERS, Group
from .session import Session
from .showing import Shown, batched, reduced_images, showing
from .variation import variation

__all__ = ["hidden", "on_covers"]

log = logging.getLogger(__name__)
AT_ONCE = 50  # classes, whose patterns are looked for in one pass over all images
ASKED = 5  # groups of a class, at most
FEWEST = 8  # of a class that can be told to share anything


def hidden(
    session: Session, trained: nn.Module, scan: Scan, aside: NDArray[np.bool_], directions: dict[int, Tensor] | None
) -> list[Part]:
    """Those of a class who show a pattern that no image does by nature, and what it does to other images.

    Where there are few classes, each holds many contents, falls in two by these, and its poison stands with some of them. Where
    there are more a few poisoned images do. All of what few of a class share holds much of their content, and turns other images
    without any poison, too (on digits 13 images of a trigger .4, others .3).

    Args:
        session: The run.
        trained: A network that was trained on all of it.
        scan: What it saw.
        aside: (N,) bool, samples that are accused, and left aside.
        directions: Of few classes, in which images vary (see variation.variation). None: there are more, and of each FEWEST or
            more are looked for, and fewer than MIN_SEEDS.

    Returns: of each class where some show it, and turn enough, those that turn most, with what they turn in `beyond`, and for
        each sample (N,) the probability of showing it."""
    labels, queues, best, small = scan.labels, list[list[Part]](), dict[int, Part](), directions is None
    if directions is None:
        directions = variation(session.ordered(session.source), labels, aside)
    least = FEWEST if small else MIN_SEEDS
    shown = showing(reduced_images(session), scan, aside, directions, directions=directions, least=least)
    for label, starts in zip(directions, shown, strict=True):
        most = MIN_SEEDS - 1 if small else (1 - BALANCED) * ((labels == label) & ~aside).sum()
        apart = [[one for one in rounds if one.apart and (one.likely > 0.5).sum() <= most] for rounds in starts]
        furthest = [max(rounds, key=lambda one: one.valley) for rounds in apart if rounds]
        parts = [_part(label, one, one.likely) for one in furthest]
        queues.append(distinct(parts) if small else parts)  # of a few images eighths of a class lead to the same
    for turn in _in_turn(queues):
        parts = [_of_all(labels == part[0].label, part) for part in turn]
        masks, batches = [likely > 0.5 for _, likely in parts], session.ordered(session.source)
        rises = imprints(trained, batches, labels, masks, runtime=session.runtime, directions=directions)
        for (group, likely), rise in zip(parts, rises, strict=True):
            log.info("class %d: %d show a pattern, which turns %.2f", group.label, group.size, rise)
            if group.label not in best or rise > (best[group.label][0].beyond or 0.0):
                best[group.label] = dataclasses.replace(group, beyond=rise, few=not small), likely
    return [part for part in best.values() if part[0].foreign]


def on_covers(session: Session, scan: Scan, aside: NDArray[np.bool_], spared: Container[int]) -> list[Part]:
    """Those of a class who show a pattern that is on images of other classes, too: a trigger that works on some classes only
    [TaCT, Tang et al. 2021], or less by itself, was taught so by covers. Poison of one class may not stand apart from another's
    styles.

    Args:
        session, scan, aside: As in hidden.
        spared: Labels that are not asked.

    Returns: of each class where some share such a pattern those whose is most clearly on others (see naming.carried), and for
        each sample (N,) 1 if it is of these, and at most MAYBE where it only shows it."""
    labels, best, images = scan.labels, dict[int, Part](), reduced_images(session)
    batches = batched(images, labels)
    asked = [label for label in np.unique(labels).tolist() if label not in spared]
    queues, clearest = zip(asked, showing(images, scan, aside, asked), strict=True), dict.fromkeys(asked, SOME_COVERS)
    while some := list(islice(queues, AT_ONCE)):
        apart = [_most_apart(label, starts, int(((labels == label) & ~aside).sum())) for label, starts in some]
        for turn in _in_turn(apart):
            parts = [_of_all(labels == part[0].label, part) for part in turn]
            masks = [likely > 0.5 for _, likely in parts]
            depths = carried(batches, labels, masks, beyond_content(batches, labels, masks, together=False))
            for (group, likely), depth in zip(parts, depths, strict=True):
                if depth > clearest[group.label]:
                    clearest[group.label] = depth
                    best[group.label] = dataclasses.replace(group, carried=depth), likely
    for group, _ in best.values():
        log.info("class %d: %d show a pattern that is on covers (%.2f)", group.label, group.size, group.carried)
    return list(best.values())


def _most_apart(label: int, starts: list[list[Shown]], total: int) -> list[Part]:
    """The groups of a class whose pattern sets those who show it furthest apart; what most of it share is its content."""
    groups = [one for rounds in starts for one in rounds if one.apart and 2 * one.group.sum() <= total]
    groups.sort(key=lambda one: -one.valley)
    parts = [_part(label, one, np.where(one.group, 1.0, np.minimum(one.likely, MAYBE))) for one in groups]
    return distinct(parts)[:ASKED]


def _part(label: int, shown: Shown, likely: NDArray[np.float64]) -> Part:
    """A group of a class of M, and the probability of each of these to be in it, (M,)."""
    return Group(label, 0, shown.separation, shown.valley, int((likely > 0.5).sum()), 0.0), likely


def _of_all(own: NDArray[np.bool_], part: Part) -> Part:
    """The same with the probability of each of all samples."""
    everyone = np.zeros(len(own))
    everyone[own] = part[1]
    return part[0], everyone


def _in_turn(queues: Sequence[list[Part]]) -> Iterator[list[Part]]:
    """The first of each, the second, and so on."""
    for turn in range(max(map(len, queues), default=0)):
        yield [queue[turn] for queue in queues if turn < len(queue)]
