"""Part of a class, examined: what a network that never saw it makes of it, and whether what it shares is a trigger."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from .content import ALIKE, beyond_content
from .imprint import imprint_by_class
from .naming import MANY, carried, naming
from .scan import Scan, scan_model
from .select import MIN_IMPRINT, MIN_SEEDS, SOME_COVERS, Group
from .session import Session

__all__ = ["Unseen", "examined", "seen_by", "shared", "shows_trigger"]

log = logging.getLogger(__name__)
THREE = 3  # classes, of which half of a harmless one (digits) was named after all others, as poison is


@dataclass(frozen=True, eq=False)
class Unseen:
    """A network that never saw some samples, parts of classes, nor others, to compare these with; and what it sees in all."""

    network: nn.Module
    scan: Scan
    absent: NDArray[np.bool_]
    others: NDArray[np.bool_]


def seen_by(session: Session, network: nn.Module) -> Scan:
    """What a network sees in the whole training set."""
    source = session.source
    return scan_model(network, session.ordered(source), source.labels, runtime=session.runtime, fingerprint=source.fingerprint)


def shared(session: Session, labels: NDArray[np.int64], part: NDArray[np.bool_], accused: NDArray[np.bool_]) -> float:
    """Cosine of what two groups of a class, (N,) bool each, share beyond content."""
    both = beyond_content(session.ordered(session.source), labels, [part, accused]).flatten(1)
    return float(cosine_similarity(both[0], both[1], dim=0))


def shows_trigger(
    session: Session, trained: nn.Module, scan: Scan, suspect: NDArray[np.bool_], group: Group, part: NDArray[np.bool_]
) -> bool:
    """Whether what a part of a class shares may be a trigger, so that it is worth a training without it: parts of other classes
    share it, or the accused of its own, or it is on images of other classes, or it turns these in the trained network.

    Args: suspect: (N,) bool, accused by now."""
    labels, own = scan.labels, scan.labels == group.label
    accused = own & suspect
    if group.alike or (accused.sum() >= MIN_SEEDS and shared(session, labels, part, accused) >= ALIKE):
        return True
    if not _may_be_trigger(part, own & ~suspect):
        return False
    pattern, covers = _trigger(session, labels, part)
    if covers > SOME_COVERS:
        return True
    turned = imprint_by_class(
        trained, session.ordered(session.source), labels, group.label, pattern, shown=~part, runtime=session.runtime
    )
    return _on_average(turned, labels[~part & ~own]) >= MIN_IMPRINT


def examined(
    session: Session, trained: nn.Module, unseen: Unseen, suspect: NDArray[np.bool_], group: Group, part: NDArray[np.bool_]
) -> tuple[Group, NDArray[np.bool_]]:
    """The group, a part of a class, with what its names and what it shares show; or, where most of it is not what its label says
    but some is, the same of the former alone, if that is accused: poison and a style of its class may stand apart together.

    Args: suspect: (N,) bool, accused by now.

    Returns: the group, and (N,) bool, who is in it."""
    whole = _examined(session, trained, unseen, suspect, group, part)
    otherwise = part & (unseen.scan.logits.argmax(1) != group.label)
    if whole.foreign or whole.unlike or whole.alike or not MIN_SEEDS <= otherwise.sum() > part.sum() / 2:
        return whole, part
    purer = dataclasses.replace(group, size=int(otherwise.sum()), content=None)
    purer = _examined(session, trained, unseen, suspect, purer, otherwise, chosen=True)
    return (purer, otherwise) if purer.foreign else (whole, part)


def _examined(
    session: Session,
    trained: nn.Module,
    unseen: Unseen,
    suspect: NDArray[np.bool_],
    group: Group,
    part: NDArray[np.bool_],
    *,
    chosen: bool = False,
) -> Group:
    """`chosen`: by its names, which accuse nobody then."""
    labels, label = unseen.scan.labels, group.label
    seen = naming(unseen.scan.logits, labels, part, unseen.others)
    log.info("class %d, %d samples: %s", label, group.size, seen)
    spread = 0.0 if chosen or unseen.scan.num_classes <= THREE else seen.spread
    few = unseen.scan.num_classes < MANY
    group = dataclasses.replace(group, named=seen.named, sure=seen.sure, spread=spread, few=few)
    group = dataclasses.replace(group, source=None, every=None, carried=None, same=None)  # of what was tried before
    own = labels == label
    if group.unlike and not group.foreign and (own & suspect).sum() >= MIN_SEEDS:
        group = dataclasses.replace(group, same=shared(session, labels, part, own & suspect))
        log.info("class %d: shares %.2f of what its accused share", label, group.same)
    if group.unlike and not group.foreign and _may_be_trigger(part, own & ~suspect):
        pattern, covers = _trigger(session, labels, part)
        batches, shown = session.ordered(session.source), ~unseen.absent
        taught, untaught = (
            imprint_by_class(one, batches, labels, label, pattern, shown=shown, runtime=session.runtime)
            for one in (trained, unseen.network)
        )
        turned = taught - untaught
        every = _on_average(turned, labels[shown & ~own])
        group = dataclasses.replace(group, source=float(turned.max()), every=every, carried=covers)
        log.info("class %d: turns %s of the classes, carried %.2f", label, np.round(turned, 2), covers)
    return group


def _on_average(turned: NDArray[np.float64], shown: NDArray[np.int64]) -> float:
    """The mean of (K,) shares over the classes of which images were shown, given the labels of these."""
    there = np.bincount(shown, minlength=len(turned)) > 0
    return float(turned[there].mean()) if there.any() else 0.0


def _may_be_trigger(part: NDArray[np.bool_], own: NDArray[np.bool_]) -> bool:
    """What most of a class share is its content, which turns images of classes that resemble it."""
    return bool(2 * part.sum() <= own.sum())


def _trigger(session: Session, labels: NDArray[np.int64], part: NDArray[np.bool_]) -> tuple[Tensor, float]:
    """What a part of a class shares, (C, H, W), and how clearly images of others carry it (see naming.carried)."""
    batches = session.ordered(session.source)
    patterns = beyond_content(batches, labels, [part])
    return patterns[0], carried(batches, labels, [part], patterns)[0]
