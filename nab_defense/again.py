"""Looking at the data again, with the network that was to be shipped."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .candidates import TRIED, candidates, rests
from .data.transforms import VARIED
from .detectors import detectors
from .examine import Unseen, examined, seen_by, shows_trigger
from .hidden import hidden
from .look import make_finding, stronger_halves, vary, with_bearers
from .naming import MANY, control, naming
from .outside import Without, foreign_parts
from .parts import DOUBT, MAYBE, Part, joined, other_half
from .passes import clearest, confirmed
from .plan import Finding
from .scan import Scan
from .select import CLEAR_IMPRINT, MAX_NAMED, MIN_SEEDS, Group, Selection, expand
from .session import Session

__all__ = ["look_again"]

log = logging.getLogger(__name__)
LEARNED = 0.5  # share of images that it must name as labelled: a network that learned little takes any pattern for a class


def look_again(session: Session, trained: nn.Module, scanner: nn.Module, before: Finding, *, without: Without) -> Finding:
    """As look, with the network that training made, among the samples that are not suspect yet.

    Poison that the scan's short training does not learn faster than content (few samples, subtle triggers, a second trigger) is
    invisible to it, but once learned it stands apart in the trained network's features. A trigger that is the same in all
    images shows in what they share. For others, where some class falls in two or did so in the scan, or some of it show a pattern
    that is on others (see hidden.on_covers), networks are trained without whole classes, and what shows the content of many other
    classes to them is accused (see outside.foreign_parts; of fewer than ten classes that which does so to one which never saw the
    part, see naming.naming). A part that stands apart, and may share a trigger, is left out of one more training, with what is
    like it, and accused where that network finds the content of few classes in it, and what it shares is a trigger: it turns
    images of all classes, or those of one and is on covers of others [TaCT, Tang et al. 2021], or it is what the accused of its
    class share, a trigger of which a part was found before. Of fewer than ten classes who shows a pattern that no image does by
    nature is accused, too, and of more where these are few (see hidden.hidden). Where nobody is accused by all that, networks are
    asked that were trained on varied images: what a filter made of an image is nothing that the others know.

    Args:
        session: The run.
        trained: Trained under the plan so far, with all triggers in it that are not in the plan.
        scanner: The scan's network, which has not learned these: it goes by content, and names the suspects.
        before: What was found so far; its suspects stay, unless they are the clean half of a class of whose rest most is accused.
        without: (mask (N,), name, augmentation) -> a network trained without these samples, augmented as the recipe says by
            default; called where there is a part to examine.

    Returns: what is found now in all; where nothing new stands apart, or the network learned too little to tell, what was found
    before, with what was examined, and whether it could be."""
    recipe, known = session.recipe, before.plan.suspect
    scan = seen_by(session, trained)
    if (scan.logits.argmax(1) == scan.labels)[~known].mean() < LEARNED:
        log.info("no second look: the trained network names less than half of the images as they are labelled")
        return dataclasses.replace(before, looked_again=False)
    report = detectors.create(recipe.scan.detector, **recipe.scan.params).detect(scan)
    selection = expand(report, scan, fraction=recipe.fraction, previous=Selection(known, before.selection.doubt), trained=True)
    directions = vary(session, known)
    selection, rises = stronger_halves(session, trained, selection, known, directions)
    selection = confirmed(selection, scan.labels, rises, known=known)
    selection = with_bearers(session, clearest(selection, scan.labels, [before.selection, selection]), directions)
    cleared = {group.label for group in before.selection.groups if group.cleared}
    for group, likely in hidden(session, trained, scan, selection.suspect, directions() if directions else None):
        selection = _with(selection, group, likely)
        cleared.add(group.label)  # its rest is not asked: who shows the pattern would be let go with it
    fresh = np.unique(scan.labels[selection.suspect & ~known]).tolist()
    queues = {queue[0][0].label: queue for queue in candidates(session, scan, selection, before, {*cleared, *fresh})}
    rest = {part[0].label: part for part in rests(before, scan.labels) if part[0].label not in cleared}
    queues |= {label: [part, *queues.get(label, [])][:TRIED] for label, part in rest.items()}
    asked = [queue[0] for label, queue in queues.items() if label not in rest]
    doubted, kin = set(rest), any(queue[0][0].alike for queue in queues.values())
    if queues and scan.num_classes >= MANY and not kin:  # a trigger of all classes is known without any one of them
        doubted |= {label for label in fresh if rises.get(label, 0.0) < CLEAR_IMPRINT}
        queues, selection, doubted = _sifted(session, trained, scan, selection, queues, doubted, without)
    selection, namer = _named(session, trained, scan, selection, [*queues.values()], doubted, without)
    if not (selection.suspect & ~known).any():
        selection, namer = _whatever_was_done(session, scan, selection, asked, without)
    new = selection.suspect & ~known
    log.info("look again: %d suspects more", new.sum())
    groups = (*_standing(before.selection.groups, selection, scan.labels, known), *selection.groups)
    if not new.any():
        return dataclasses.replace(before, selection=dataclasses.replace(before.selection, groups=groups))
    selection = dataclasses.replace(selection, groups=groups)
    return make_finding(session, scan, report, selection, namer or scanner, unseen=namer is not None)


def _standing(groups: tuple[Group, ...], now: Selection, labels: NDArray[np.int64], known: NDArray[np.bool_]) -> list[Group]:
    """Of what was found before: what is accused still, and what was not looked at again."""
    examined, still = {group.label for group in now.groups}, set(np.unique(labels[known & now.suspect]).tolist())
    still -= set(np.unique(labels[known & ~now.suspect]).tolist())  # let go, but for a few that belong to the other half
    return [g for g in groups if g.label not in examined or (g.label in still and not g.acquitted and not g.cleared)]


def _sifted(
    session: Session,
    trained: nn.Module,
    scan: Scan,
    selection: Selection,
    queues: dict[int, list[Part]],
    doubted: set[int],
    without: Without,
) -> tuple[dict[int, list[Part]], Selection, set[int]]:
    """What is worth a training without it: the parts of any class that are foreign to networks which never saw the class, and of
    the others those in `queues` that may share a trigger, or of whose class nothing could be told. The accused of a class in
    `doubted` are looked at with the rest of it.

    Returns: label -> parts, the selection with the others on record, and which classes are still in doubt."""
    back = selection.suspect & np.isin(scan.labels, [*doubted])
    apart = {label: queue[1:] if label in doubted else queue for label, queue in queues.items()}  # the rest does not by itself
    found = foreign_parts(session, scan, selection.suspect & ~back, apart, without)
    news = {label: int(((part[1] > 0.5) & ~selection.suspect).sum()) for label, part in found.items()}
    worth = {
        label: [(dataclasses.replace(group, doubted=label in doubted), likely)]
        for label, (group, likely) in found.items()
        if group.foreign and news[label] >= MIN_SEEDS
    }
    left = {label for label in doubted if label in worth or (label in queues and label not in found)}
    tried = partial(shows_trigger, session, trained, scan, selection.suspect)
    for label, queue in queues.items():
        if label not in found:
            worth[label] = queue
        elif label not in worth:
            content = found[label][0].content
            unsure = label in doubted
            queue = [(dataclasses.replace(group, content=content, doubted=unsure), likely) for group, likely in queue]
            others = queue[1:] if label in doubted else queue  # the rest of a class shares its content
            if kept := [part for part in others if tried(part[0], part[1] > 0.5)]:
                worth[label] = kept
            else:
                selection = _on_record(selection, queue[0][0])
    return worth, selection, left


def _named(
    session: Session,
    trained: nn.Module,
    scan: Scan,
    selection: Selection,
    queues: list[list[Part]],
    doubted: set[int],
    without: Without,
) -> tuple[Selection, nn.Module | None]:
    """Accuse parts of classes by the names that they get where they are left out: the first of each class, then the next of those
    where it was not accused. Of a class in `doubted` the accused are let go if the first is most of what is not.

    Returns: the selection, and a network that never saw the accused; None where nobody is accused by this."""
    namer, turn = None, 0
    while queues:
        parts, turn = [queue[0] for queue in queues], turn + 1
        back = selection.suspect & np.isin(scan.labels, [*doubted])
        absent = np.any([selection.suspect & ~back, *(likely > DOUBT for _, likely in parts)], axis=0)
        others = control(absent, session.recipe.seed)
        network = without(absent | others, f"part{turn}")
        unseen, left, found = Unseen(network, seen_by(session, network), absent, others), [], False
        right = unseen.scan.logits.argmax(1) == scan.labels
        # One trigger, one verdict: what it makes of an image may look like one of the classes to a network that never saw it.
        kin = [likely > 0.5 for group, likely in parts if group.alike]
        kin_named = float(right[np.any(kin, axis=0)].mean()) if kin else None
        learned = right[others].mean() >= LEARNED
        if not learned:
            log.warning(
                "a network trained without %d samples names less than half of the others right: its names tell nothing",
                absent.sum(),
            )
        for (group, likely), queue in zip(parts, queues, strict=True):
            if not learned and group.content is None:
                continue  # how foreign it is to a network that never saw its class is not known either
            members = (scan.labels == group.label) & ~selection.suspect
            group, part = examined(session, trained, unseen, selection.suspect & ~back, group, likely > 0.5)
            likely = np.where(part, likely, np.minimum(likely, MAYBE))
            if group.alike:
                group = dataclasses.replace(group, named=kin_named)
            if not group.foreign:
                left.append(queue[1:])
            else:
                found = True
                likely = np.where(members, likely, 0)
                if not group.alike:
                    ordinary = ~absent & ~others & (scan.labels != group.label)
                    more = joined(scan, members, likely, unseen.scan.logits, ordinary)
                    if (members & (more <= 0.5)).sum() >= MIN_SEEDS or (selection.suspect & (scan.labels == group.label)).any():
                        likely = more  # else nobody would be left to compare with
                    group = dataclasses.replace(group, size=int((likely > 0.5).sum()))
                    log.info("class %d: %d samples in all", group.label, group.size)
                left_over = int(members.sum()) - group.size
                if (group.label in doubted and group.size > left_over) or left_over < MIN_SEEDS:  # of a class not all is accused
                    selection = _let_go(selection, scan.labels == group.label, group.label)
            selection = _with(selection, group, likely)
        if found:  # what came back and stays accused must be forgotten before it is named
            namer = None if (back & selection.suspect & ~absent).any() else network
        queues, doubted = [queue for queue in left if queue], set()
    return selection, namer


def _whatever_was_done(
    session: Session, scan: Scan, selection: Selection, parts: list[Part], without: Without
) -> tuple[Selection, nn.Module | None]:
    """Accuse parts of classes that show many classes to a network which never saw them and was trained on varied images.

    A trigger that changes the whole image, a blur or a filter, shares nothing that could be added to others, and a network that
    knows images as they come is at a loss with what they show: its names are neither sure nor many. One that was trained on
    images turned, sheared, paled, solarized and more [TrivialAugment, Müller and Hutter 2021, arXiv:2103.10158], and with less
    detail, names what the change left of their content, all classes; a style keeps its class's name, or resembles few. Where a
    part loses its class's name with the rest left in, either may be the poison, so that the rest is asked, too.

    Returns: as _named."""
    labels = scan.labels
    parts = [part for part in parts if not part[0].alike and part[0].size >= MIN_SEEDS]
    for turn in (1, 2):
        if not parts or scan.num_classes < MANY:
            break
        absent = np.any([selection.suspect, *(likely > DOUBT for _, likely in parts)], axis=0)
        others, rests, found = control(absent, session.recipe.seed), [], False
        network = without(absent | others, f"varied{turn}", VARIED)
        logits = seen_by(session, network).logits
        if (logits.argmax(1) == labels)[others].mean() < LEARNED:
            break
        for group, likely in parts:
            told = naming(logits, labels, likely > 0.5, others, unbiased=True)
            log.info("class %d, %d samples, by varied images: %s", group.label, group.size, told)
            group = dataclasses.replace(group, varied=told.spread if told.named < MAX_NAMED else 0.0)
            rest = other_half((labels == group.label) & ~selection.suspect, (group, likely))
            if rest[0].size < MIN_SEEDS:
                continue
            if group.foreign:
                selection, found = _with(selection, group, likely), True
            elif told.named < MAX_NAMED:
                rests.append(rest)
        if found:
            return selection, network
        parts = rests
    return selection, None


def _with(selection: Selection, group: Group, likely: NDArray[np.float64]) -> Selection:
    """The selection with a group that was examined by its names: accused where it is foreign, and on record."""
    selection = _on_record(selection, group)
    if not group.foreign:
        return selection
    doubt = np.maximum(selection.doubt, likely).astype(np.float32)
    return dataclasses.replace(selection, suspect=selection.suspect | (likely > 0.5), doubt=doubt)


def _on_record(selection: Selection, group: Group) -> Selection:
    """The selection with a group in place of the one of its class, whose imprint it keeps."""
    old = next((other for other in selection.groups if other.label == group.label), group)
    if old.imprint is not None:
        group = dataclasses.replace(group, imprint=old.imprint, share=old.share)
    return dataclasses.replace(selection, groups=(*(other for other in selection.groups if other is not old), group))


def _let_go(selection: Selection, members: NDArray[np.bool_], label: int) -> Selection:
    """The selection without what was found in one class."""
    groups = tuple(group for group in selection.groups if group.label != label)
    return Selection(selection.suspect & ~members, np.where(members, 0, selection.doubt).astype(np.float32), groups)
