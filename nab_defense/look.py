"""Looking at the data with a network trained for it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from . import imprint
from .detectors import detectors
from .detectors.lga import lga_loss
from .naming import MANY, bearers
from .passes import JUDGES, clear, clearest, confirmed, judged, overfull, settled
from .plan import Finding, make_plan, paper_plan
from .relabel import relabelers
from .replay import fit_once, scan_key
from .runtime import Runtime
from .scan import EarlyScan, Scan, scan_model
from .select import BALANCED, CLEAR_IMPRINT, MIN_SEEDS, Selection, expand, take_fraction
from .session import Session
from .train import TrainConfig
from .types import SuspectReport
from .variation import variation

__all__ = ["accuse", "look", "make_finding", "scan_whole", "stronger_halves", "vary", "with_bearers"]

log = logging.getLogger(__name__)


def look(session: Session, *, kept: bool = False) -> tuple[Finding, nn.Module]:
    """Scan the training source, rank, select, relabel, plan. Sees images and given labels only.

    The scan ends early where two passes find alike, what each group shares is a trigger beyond doubt, and none is most of its
    class, which may be the clean part. A network that is pushed up and down by the scan's loss obeys a trigger at one pass and
    not at the next, and a young one takes any pattern for a class, so the verdict on a group in doubt is that of the last passes
    of the whole scan.

    Args:
        session: The run.
        kept: Keep the scan's training for other runs, and take it from an earlier one that was alike.

    Returns: what was found, and the scan's network."""
    recipe = session.recipe
    if recipe.rule == "paper":
        scan, network = scan_whole(session, kept=kept)
        return accuse(session, scan, network), network
    detector = detectors.create(recipe.scan.detector, **recipe.scan.params)
    found: list[tuple[SuspectReport, Selection]] = []
    tried: list[dict[int, float]] = []
    directions = vary(session, np.zeros(len(session.source), bool))

    def watch(seen: Scan, network: nn.Module) -> bool:
        last = found[-1][1] if found else None
        report = detector.detect(seen)
        selection = expand(report, seen, fraction=recipe.fraction, previous=last)
        log.info("scan %d: %d suspects", seen.epoch, selection.suspect.sum())
        stands = last is not None and settled(last, selection)
        if stands or seen.epoch > recipe.scan.epochs - JUDGES:
            selection, rises = stronger_halves(session, network, selection, np.zeros(len(seen), bool), directions)
            tried.append(rises)
        found.append((report, selection))
        return stands and clear(tried[-1]) and not overfull(selection.suspect, seen.labels)

    scan, network = _scan(session, watch, kept)
    report, selection = found[-1]
    selection = clearest(confirmed(selection, scan.labels, judged(tried)), scan.labels, [one for _, one in found])
    selection = with_bearers(session, selection, directions)
    return make_finding(session, scan, report, selection, network, own=True), network


def scan_whole(session: Session, *, kept: bool = False) -> tuple[Scan, nn.Module]:
    """All epochs of the scan, as the paper's rule has it; no detector has a say in it. `kept` as in look."""
    return _scan(session, lambda seen, network: False, kept)  # it goes on to its last epoch


def accuse(session: Session, scan: Scan, network: nn.Module) -> Finding:
    """The paper's rule on a whole scan: the recipe's detector ranks, its top fraction is relabelled.

    Args: network: The scan's."""
    report = detectors.create(session.recipe.scan.detector, **session.recipe.scan.params).detect(scan)
    return make_finding(session, scan, report, take_fraction(report, session.recipe.fraction), network, own=True)


def make_finding(
    session: Session,
    scan: Scan,
    report: SuspectReport,
    selection: Selection,
    namer: nn.Module,
    *,
    own: bool = False,
    unseen: bool = False,
) -> Finding:
    """From suspects to a plan; `namer` labels the suspects. `own`: the scan is its own. `unseen`: it was trained without the
    suspects, and has nothing to forget."""
    recipe = session.recipe
    proposed, confidence = _relabel(session, scan, namer, selection.suspect, own, unseen)
    if recipe.rule == "paper":
        return Finding(report, selection, paper_plan(scan, selection.suspect, proposed), confidence)
    plan = make_plan(
        scan, selection.suspect, proposed, confidence, doubt=selection.doubt,
        min_confidence=recipe.relabel.min_confidence, cover_fraction=recipe.relabel.cover_fraction, seed=recipe.seed,
    )  # fmt: skip
    return Finding(report, selection, plan, confidence)


def _scan(session: Session, watch: Callable[[Scan, nn.Module], bool], kept: bool) -> tuple[Scan, nn.Module]:
    source, stage = session.source, session.recipe.scan
    network = session.build(stage.model)
    settings = TrainConfig(
        epochs=stage.epochs, batch_size=stage.batch_size, lr=stage.lr, momentum=stage.momentum,
        weight_decay=stage.weight_decay, sched="none",
    )  # fmt: skip
    loss = lga_loss(stage.gamma, stage.form)
    runtime = _exact(session.runtime)
    batches, mark = session.ordered(source), source.fingerprint
    passes = EarlyScan(batches, source.labels, look=lambda seen: watch(seen, network), runtime=runtime, fingerprint=mark)
    key = None
    if kept:
        facts = {"size": session.size, "pixels": session.normalization, "built": dataclasses.asdict(session.network(stage.model))}
        key = scan_key(
            network, mark, runtime=runtime, **facts, train=dataclasses.asdict(settings), loss=(stage.gamma, stage.form)
        )
    fit_once(network, session.scan_loader(source), passes, key=key, runtime=runtime, train=settings, loss=loss)
    assert passes.last is not None  # fit runs at least one epoch
    return passes.last, network


def _exact(runtime: Runtime) -> Runtime:
    """What a scan trains and reads with. What stands apart after a few epochs hangs on small differences, which bfloat16 blurs:
    there more scans find nothing, so it is used only where the recipe asks for it."""
    return dataclasses.replace(runtime, precision="float32") if runtime.precision == "auto" else runtime


def stronger_halves(
    session: Session,
    network: nn.Module,
    selection: Selection,
    known: NDArray[np.bool_],
    directions: Callable[[], dict[int, Tensor]] | None,
) -> tuple[Selection, dict[int, float]]:
    """What the suspects of each label share, tried on other images (see imprint.imprints).

    Where about half of a class stands apart, the clean half may be the one that was taken. What makes a zero turns other images
    to zeros, too, but a trigger turns more: so both are tried, and the half that turns more takes the place of the other.
    Of few classes, beside each of which there is hardly another to turn to, what a style shares turns as many (.82 on digits in
    two): there only what they share beyond how images vary is tried (of a style .26 at most, of a fixed pattern .6).

    Args:
        selection: What stands apart.
        known: (N,) bool, suspects that stay, and are not tried.
        directions: Of few classes, in which images vary (see variation.variation); asked for where there is something to try.

    Returns: the selection, and label -> share that its suspects turn."""
    labels, suspect, doubt = session.source.labels, selection.suspect.copy(), selection.doubt.copy()
    fresh = suspect & ~known
    given = np.unique(labels[fresh]).tolist()
    groups = [fresh & (labels == label) for label in given]
    rests = [(labels == label) & ~suspect for label in given]
    pairs = zip(given, groups, rests, strict=True)
    halves = {
        label: rest for label, group, rest in pairs if group.sum() > BALANCED * (group | rest).sum() and rest.sum() >= MIN_SEEDS
    }
    tried = [*groups, *halves.values()]
    known_directions = directions() if directions and tried else None
    batches = session.ordered(session.source)
    rises = imprint.imprints(network, batches, labels, tried, runtime=session.runtime, directions=known_directions)
    turned, other = dict(zip(given, rises[: len(given)], strict=True)), dict(zip(halves, rises[len(given) :], strict=True))
    sizes = {}
    for label, group in zip(given, groups, strict=True):
        log.info("class %d: %d suspects, imprint %.2f", label, group.sum(), turned[label])
        if other.get(label, -1.0) > turned[label]:
            members = group | halves[label]
            suspect[members], doubt[members] = ~suspect[members], 1 - doubt[members]
            turned[label], sizes[label] = other[label], int(halves[label].sum())
            log.info("class %d: the other half, %d samples, imprint %.2f", label, sizes[label], turned[label])
    swapped = tuple(dataclasses.replace(group, size=sizes.get(group.label, group.size)) for group in selection.groups)
    return Selection(suspect, doubt, swapped), turned


def vary(session: Session, aside: NDArray[np.bool_]) -> Callable[[], dict[int, Tensor]] | None:
    """Where there are few classes, what variation.variation returns, from the first time that it is called on."""
    if len(session.source.classes) >= MANY:
        return None
    return cache(lambda: variation(session.ordered(session.source), session.source.labels, aside))


def with_bearers(session: Session, selection: Selection, directions: Callable[[], dict[int, Tensor]] | None) -> Selection:
    """With the others of their class that show the trigger of groups which share one beyond doubt: a few that are left are
    enough to teach it."""
    labels, suspect, doubt, groups = session.source.labels, selection.suspect, selection.doubt, list(selection.groups)
    beyond_doubt = [place for place, group in enumerate(groups) if (group.imprint or 0) >= CLEAR_IMPRINT]
    accused = {place: mask for place in beyond_doubt if (mask := suspect & (labels == groups[place].label)).any()}
    given = directions() if directions and accused else None
    found = bearers(session.ordered(session.source), labels, [*accused.values()], directions=given)
    for (place, known), likely in zip(accused.items(), found, strict=True):
        label, more = groups[place].label, known | (likely > 0.5)
        if ((labels == label) & ~more).sum() >= MIN_SEEDS:
            log.info("class %d: %d more show its trigger", label, (more & ~known).sum())
            suspect, doubt = suspect | more, np.maximum(doubt, np.where(more, likely, 0)).astype(np.float32)
            groups[place] = dataclasses.replace(groups[place], size=int(more.sum()))
    return Selection(suspect, doubt, tuple(groups))


def _relabel(
    session: Session, scan: Scan, network: nn.Module, suspect: NDArray[np.bool_], own: bool, unseen: bool
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    stage, runtime = session.recipe.relabel, session.runtime
    if not suspect.any():
        return scan.labels, np.ones(len(scan), dtype=np.float32)
    knobs: dict[str, Any] = dict(stage.params)
    if stage.name == "unlearned":
        knobs |= {"model": network, "loaders": session.relabel_loader, "runtime": runtime, "unseen": unseen}
    else:
        encoder = network if stage.encoder is None else session.build(stage.encoder)
        # Read again where that may give other features.
        if stage.encoder is not None or not own or _exact(runtime).amp_dtype != runtime.amp_dtype:
            batches = session.ordered(session.source)
            scan = scan_model(encoder, batches, scan.labels, runtime=runtime, fingerprint=scan.fingerprint)
        if stage.name == "trusted":
            verified = session.trusted_source
            seen = scan_model(encoder, session.ordered(verified), verified.labels, runtime=runtime)
            knobs |= {"features": seen.features, "labels": seen.labels}
    return relabelers.create(stage.name, **knobs).relabel(scan, suspect)
