"""Classes from outside: what networks that never saw any image with a given label make of those that have it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax
from torch import nn

from . import ranks
from .examine import seen_by
from .naming import control, naming
from .parts import DOUBT, Part
from .principal import Standardized
from .scan import Scan
from .select import MIN_CONTENT, MIN_SEEDS, MIN_SPREAD, grow
from .session import Session

__all__ = ["Without", "foreign_parts"]

log = logging.getLogger(__name__)
FOLDS = 3  # of the classes, each left out of one training
SUREST = 0.2, 0.3, 0.4  # of a class, from which the part grows
COMPARED = 6  # classes, at least, to tell what is typical
SOME_CONTENT = 0.07  # enough above that to ask a network that knows all other classes
ASKED = 3  # classes, at most, of which this is asked, the most foreign ones
Without = Callable[..., nn.Module]  # (mask (N,), name, augmentation) -> a network trained without these samples


def foreign_parts(
    session: Session, scan: Scan, aside: NDArray[np.bool_], queues: dict[int, list[Part]], without: Without
) -> dict[int, Part]:
    """The part of each class that looks most like other classes to a network which never saw the class.

    Dirty-label poison, whatever its trigger, shows what other classes show. A network that was trained on part of it knows its
    trigger, and one that was trained on the rest of its class knows the label; one that never saw the label knows neither, and
    names poison by its content, nearly as surely as other images and after all classes, where it is at a loss with what is new
    to it. So the surest fifth of a class, or third, is where poison is, if there is any, and a probe on what the trained network
    sees, which knows the trigger, and on these names finds the rest of it; or it is a part that stands apart by itself, where
    that is more foreign, or what grows is most of the class. First a third of the classes is left out of a training each; then,
    alone, those of which a part is many-sided enough to be foreign. What is typical of classes is taken off: where they resemble
    each other, as in photographs, what is new is named surely, too.

    Args:
        session: The run.
        scan: What a network saw that was trained on all of it.
        aside: (N,) bool, samples that are accused and left out.
        queues: label -> parts of the class that stand apart.
        without: (mask (N,), name) -> a network trained without these samples.

    Returns: for each class that could be told, the part, with what its names show in `content`, and the probability of each of
        all samples (N,) to be in it; nothing where too few classes are large enough to know what is typical."""
    counts = np.bincount(scan.labels[~aside], minlength=scan.num_classes)
    labels = np.random.default_rng([session.recipe.seed, 3]).permutation(np.flatnonzero(counts >= 2 * MIN_SEEDS))
    if len(labels) < COMPARED:
        return {}
    raw: dict[int, Part] = {}
    told = partial(_from_outside, session, scan, aside, queues, without)
    for turn in range(FOLDS):
        raw |= told(labels[turn::FOLDS].tolist(), f"fold{turn + 1}")
    if len(raw) < COMPARED:
        return {}
    typical = float(np.median([group.content for group, _ in raw.values()]))
    excess = {label: (group.content or 0) - typical for label, (group, _) in raw.items()}
    doubtful = ranks.same(sorted((label for label in excess if excess[label] > SOME_CONTENT), key=lambda label: -excess[label]))
    for place, label in enumerate(doubtful):
        raw.pop(label)
        if place < ASKED:
            raw |= told([label], f"class{label}", typical + MIN_CONTENT)
    found = {k: (dataclasses.replace(group, content=(group.content or 0) - typical), p) for k, (group, p) in raw.items()}
    most = max((group for group, _ in found.values()), key=lambda group: group.content or 0)
    log.info("seen from outside, class %d is the most foreign: %d samples, by %.2f", most.label, most.size, most.content)
    return found


def _from_outside(
    session: Session,
    scan: Scan,
    aside: NDArray[np.bool_],
    queues: dict[int, list[Part]],
    without: Without,
    outside: list[int],
    name: str,
    enough: float = 1.0,
) -> dict[int, Part]:
    """The most foreign part of some classes each, as a network sees them that was trained without these; where that is most of
    its class, one in `queues` that has more than `enough` and is named as variously as poison is: what stands apart is purer than
    what grows without end, and clean half of a class is named as surely."""
    labels, found = scan.labels, {}
    absent = aside | np.isin(labels, outside)
    others = control(absent, session.recipe.seed)
    logits = seen_by(session, without(absent | others, name)).logits
    known = np.delete(logits, outside, axis=1)
    surest, features = logsumexp(known, axis=1), Standardized(scan.features, softmax(known, axis=1))

    for label in outside:
        members = (labels == label) & ~aside
        apart = [(one, np.where(members, likely, 0)) for one, likely in queues.get(label, [])]
        apart = [part for part in apart if _tells(part[1], members)]
        rows = np.flatnonzero(members)
        ranked = rows[np.argsort(-surest[rows])]
        grown = []
        for share in SUREST:
            start, likely = np.zeros_like(members), np.zeros(len(members))
            start[ranked[: max(MIN_SEEDS, round(share * len(rows)))]] = True
            group, likely[members] = grow(features, members, start, scan.losses, np.zeros_like(members))
            if _tells(likely, members):
                grown.append((group, likely))
        parts = [*apart, *grown]
        if not parts:
            continue
        names = [naming(logits, labels, likely > 0.5, others, outside=outside) for _, likely in parts]
        told = [name.sure * min(1.0, name.spread) for name in names]
        best = int(np.argmax(told))
        purer = [i for i in range(len(apart)) if told[i] > enough and names[i].spread > MIN_SPREAD]
        if 2 * (parts[best][1] > 0.5).sum() > len(rows) and purer:
            best = max(purer, key=lambda i: told[i])
        group, likely = parts[best]
        if (members & (likely <= DOUBT)).sum() < MIN_SEEDS:  # to learn the class from without it
            likely = (likely > 0.5).astype(np.float64)
        size = int((likely > 0.5).sum())
        log.debug("class %d from outside, part %d of %d, %d samples: %.2f", label, best, len(parts), size, told[best])
        found[label] = dataclasses.replace(group, label=label, size=size, content=told[best]), likely
    return found


def _tells(likely: NDArray[np.float64], members: NDArray[np.bool_]) -> bool:
    """Both the part and the rest of its class are large enough to be seen."""
    size = int((likely > 0.5).sum())
    return bool(MIN_SEEDS <= size <= members.sum() - MIN_SEEDS)
