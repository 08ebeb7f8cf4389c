"""Which parts of classes a second look examines by their names, and in which order."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import torch
from numpy.typing import NDArray

from .content import ALIKE, alike, beyond_content
from .examine import shared
from .hidden import on_covers
from .naming import MANY, all_bearers, second_choices
from .parts import DOUBT, Part, distinct, other_half, same_parts, smaller_halves, with_more_like_it
from .plan import Finding, clean_label_groups
from .scan import Scan
from .select import BALANCED, CLEAR_IMPRINT, MIN_ALIKE, MIN_SEEDS, Group, Selection
from .session import Session

__all__ = ["TRIED", "candidates", "rests", "unasked"]

log = logging.getLogger(__name__)
FEW_CLASSES = 3  # two may have styles that are alike
TRIED = 2  # parts of a class in one look, each of which may cost a training


def candidates(session: Session, scan: Scan, selection: Selection, before: Finding, spared: set[int]) -> list[list[Part]]:
    """Of each class that is to be examined by names its parts, in the order in which they are tried: one that shares what parts
    of other classes share; else what stood apart and shared no trigger that can be added to other images, in this look or
    before; the smaller part, where a class falls in two, and the larger one where the two are nearly alike: of these the two that
    the trained network's second choices speak for, or what shows a pattern that is on covers, and one of them. None of the labels
    in `spared`; beside a trigger beyond doubt only what shares it."""
    halves = {group.label: (group, likely) for group, likely in smaller_halves(scan, selection.suspect)}
    kin = _kin(session, scan, halves, selection.suspect)
    queues = {label: [part] for label, part in halves.items() if part[0].size >= MIN_SEEDS and label not in {*spared, *kin}}
    apart, both = (selection.doubt > 0.5) & ~selection.suspect, (*selection.groups, *before.selection.groups)
    for label in np.unique(scan.labels[apart & ~np.isin(scan.labels, [*spared, *kin])]).tolist():
        members = apart & (scan.labels == label)
        if members.sum() < MIN_SEEDS:
            continue  # what is left of a group whose other samples were accused meanwhile
        group = max((g for g in both if g.label == label), key=lambda g: g.imprint is not None)  # which that was, was tried
        own = (scan.labels == label) & ~selection.suspect
        part = unasked(group, int(members.sum())), with_more_like_it(scan, own, members)
        queues[label] = [*queues.get(label, []), part]
    sure = {g.label for g in before.selection.groups if not g.acquitted and (g.imprint or 0) >= CLEAR_IMPRINT}
    for label, queue in queues.items():
        own = (scan.labels == label) & ~selection.suspect
        queue.sort(key=lambda part: -part[0].separation)  # of two that are nearly the same the one that stands further apart
        queue += [other_half(own, part) for part in queue if part[0].size > BALANCED * own.sum()]
        queue = [part for part in queue if part[0].size >= MIN_SEEDS and _leaves_enough(part, own)]
        if label in sure:  # more of that poison shares its trigger; and half of a class is soon named after many others
            accused = (scan.labels == label) & selection.suspect
            queue = [part for part in queue if shared(session, scan.labels, part[1] > 0.5, accused) >= ALIKE]
        queues[label] = distinct(queue)
    groups = [likely > 0.5 for queue in queues.values() for _, likely in queue]
    seconds = iter(second_choices(scan.logits, scan.labels, groups, selection.suspect))
    for label, queue in queues.items():
        # The likeliest first; then the surest of the others, as what one source class gives has no spread.
        told = [(part, *next(seconds)) for part in queue]
        told.sort(key=lambda one: -one[1] * one[2])
        told[1:] = sorted(told[1:], key=lambda one: -one[1])
        queues[label] = [part for part, *_ in told[:TRIED]]
    if not kin and scan.num_classes >= MANY:  # a trigger of all classes is on images of all
        for part in on_covers(session, scan, selection.suspect, spared | sure):
            label = part[0].label
            if _leaves_enough(part, (scan.labels == label) & ~selection.suspect):
                queues[label] = distinct([part, *queues.get(label, [])])[:TRIED]
    queues |= {label: [part] for label, part in kin.items() if label not in spared}
    return [queue for queue in queues.values() if queue]


def _leaves_enough(part: Part, own: NDArray[np.bool_]) -> bool:
    """Of its class, (N,) bool: a network that hardly saw that cannot tell what is foreign to it."""
    return bool((own & (part[1] <= DOUBT)).sum() >= MIN_SEEDS)


def rests(before: Finding, labels: NDArray[np.int64]) -> list[Part]:
    """What is left of each class about half of which, or more, is accused as clean-label poison, or for a trigger that is in
    doubt: that may be the clean half. What makes a zero turns other images to zeros, as a trigger does, where all others that are
    labelled zero show something else."""
    found, plan = [], before.plan
    clean = {int(labels[group][0]) for group in clean_label_groups(labels, plan.new_labels, plan.suspect)}
    for label in np.unique(labels[plan.suspect]).tolist():
        own, groups = labels == label, [group for group in before.selection.groups if group.label == label]
        accused, rest = own & plan.suspect, own & ~plan.suspect
        sure = any(group.foreign or (group.imprint or 0) >= CLEAR_IMPRINT for group in groups)
        if (label in clean or not sure) and rest.sum() >= MIN_SEEDS and accused.sum() > BALANCED * own.sum():
            part = dataclasses.replace(unasked(groups[0], int(rest.sum())), imprint=None, share=0.0)
            found.append((part, rest.astype(np.float64)))
    return found


def unasked(group: Group, size: int) -> Group:
    """A part that was found with the group, without what was asked of that."""
    asked = dict.fromkeys(("named", "sure", "spread", "source", "every", "carried", "same", "content", "beyond", "varied"))
    return dataclasses.replace(group, size=size, alike=0.0, doubted=False, **asked)  # type: ignore[arg-type]


def _kin(session: Session, scan: Scan, halves: dict[int, Part], aside: NDArray[np.bool_]) -> dict[int, Part]:
    """Of the halves those that share what others share, and what is like them in the classes without such a half: poison that is
    spread over its target classes (all to all) is thin in each, but has one trigger."""
    enough = max(FEW_CLASSES, MIN_ALIKE * scan.num_classes)
    if len(halves) < enough:
        return {}
    groups = [likely > 0.5 for _, likely in halves.values()]
    patterns = beyond_content(session.ordered(session.source), scan.labels, groups)
    same = alike(patterns)
    kin = {label: part for (label, part), is_alike in zip(halves.items(), same, strict=True) if is_alike}
    log.info("parts of %d classes share the same", len(kin))
    if len(kin) < enough:
        return {}
    some = np.any([likely > 0.5 for _, likely in kin.values()], axis=0)
    kin |= {group.label: (group, likely) for group, likely in same_parts(scan, aside, some)}
    shows = np.where(aside, 0, all_bearers(session.ordered(session.source), scan.labels, some, patterns[torch.from_numpy(same)]))
    for label in np.unique(scan.labels[shows > 0.5]).tolist():
        group, likely = kin.get(label, (Group(label, 0, 0.0, 0.0, 0, 0.0), np.zeros(len(shows))))
        likely = np.maximum(likely, np.where(scan.labels == label, shows, 0))
        kin[label] = dataclasses.replace(group, size=int((likely > 0.5).sum())), likely
    share = len(kin) / scan.num_classes
    return {label: (dataclasses.replace(group, alike=share), likely) for label, (group, likely) in kin.items()}
