"""Looking at the data: with a network trained for it, and again with the one that was to be shipped."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .check import imprint
from .detectors import detectors
from .detectors.lga import lga_loss
from .plan import Finding, make_plan, paper_plan
from .relabel import relabelers
from .replay import fit_once, scan_key
from .scan import EarlyScan, Scan, scan_model
from .select import Selection, expand, settled, take_fraction
from .session import Session
from .train import TrainConfig
from .types import SuspectReport

__all__ = ["accuse", "look", "look_again", "scan_whole"]

log = logging.getLogger(__name__)


def look(session: Session, *, kept: bool = False) -> tuple[Finding, nn.Module]:
    """Scan the training source, rank, select, relabel, plan. Sees images and given labels only.

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

    def watch(seen: Scan) -> bool:
        last = found[-1][1] if found else None
        report = detector.detect(seen)
        selection = expand(report, seen, fraction=recipe.fraction, previous=last)
        found.append((report, selection))
        log.info("scan %d: %d suspects", seen.epoch, selection.suspect.sum())
        return last is not None and settled(last, selection)

    scan, network = _scan(session, watch, kept)
    return _finding(session, scan, *found[-1], network, network), network


def scan_whole(session: Session, *, kept: bool = False) -> tuple[Scan, nn.Module]:
    """All epochs of the scan, as the paper's rule has it; no detector has a say in it. `kept` as in look."""
    return _scan(session, lambda seen: False, kept)


def accuse(session: Session, scan: Scan, network: nn.Module) -> Finding:
    """The paper's rule on a whole scan: the recipe's detector ranks, its top fraction is relabelled.

    Args: network: The scan's."""
    report = detectors.create(session.recipe.scan.detector, **session.recipe.scan.params).detect(scan)
    return _finding(session, scan, report, take_fraction(report, session.recipe.fraction), network, network)


def look_again(session: Session, trained: nn.Module, scanner: nn.Module) -> Finding:
    """The same with the network that ordinary training made.

    Poison that the scan's short training does not learn faster than content (few samples, subtle triggers) is invisible to it,
    but once learned it stands apart in the trained network's features.

    Args:
        trained: Trained on everything, with all triggers in it.
        scanner: The scan's network, in which nothing was found: it goes by content, and names the suspects."""
    source, recipe = session.source, session.recipe
    detector = detectors.create(recipe.scan.detector, **recipe.scan.params)
    scan = scan_model(trained, session.ordered(source), source.labels, runtime=session.runtime, fingerprint=source.fingerprint)
    report = detector.detect(scan)
    selection = expand(report, scan, fraction=recipe.fraction, trained=True)
    log.info("second look: %d suspects", selection.suspect.sum())
    return _finding(session, scan, report, selection, trained, scanner)


def _finding(
    session: Session, scan: Scan, report: SuspectReport, selection: Selection, network: nn.Module, namer: nn.Module
) -> Finding:
    """From suspects to a plan; `network` knows the triggers, `namer` labels the suspects."""
    recipe = session.recipe
    if recipe.rule == "expand":
        selection = _confirmed(session, selection, scan, network)
    proposed, confidence = _relabel(session, scan, namer, selection.suspect)
    if recipe.rule == "paper":
        return Finding(report, selection, paper_plan(scan, selection.suspect, proposed), confidence)
    plan = make_plan(
        scan, selection.suspect, proposed, confidence, doubt=selection.doubt,
        min_confidence=recipe.relabel.min_confidence, cover_fraction=recipe.relabel.cover_fraction, seed=recipe.seed,
    )  # fmt: skip
    return Finding(report, selection, plan, confidence)


def _scan(session: Session, watch: Callable[[Scan], bool], kept: bool) -> tuple[Scan, nn.Module]:
    source, stage = session.source, session.recipe.scan
    network = session.build()
    settings = TrainConfig(
        epochs=stage.epochs, batch_size=stage.batch_size, lr=stage.lr, momentum=stage.momentum,
        weight_decay=stage.weight_decay, sched="none",
    )  # fmt: skip
    loss = lga_loss(stage.gamma, stage.form)
    runtime, batches, mark = session.runtime, session.ordered(source), source.fingerprint
    passes = EarlyScan(batches, source.labels, look=watch, runtime=runtime, fingerprint=mark)
    key = None
    if kept:
        facts = {"size": session.size, "pixels": session.normalization, "built": dataclasses.asdict(session.network())}
        key = scan_key(
            network, mark, runtime=runtime, **facts, train=dataclasses.asdict(settings), loss=(stage.gamma, stage.form)
        )
    fit_once(network, session.scan_loader(source), passes, key=key, runtime=runtime, train=settings, loss=loss)
    assert passes.last is not None  # fit runs at least one epoch
    return passes.last, network


def _confirmed(session: Session, selection: Selection, scan: Scan, network: nn.Module) -> Selection:
    """Try what each group shares on other images, and let go those that share no trigger."""
    suspect, doubt, groups = selection.suspect.copy(), selection.doubt.copy(), []
    for group in selection.groups:
        members = scan.labels == group.label
        if (suspect & members).any():
            rise = imprint(network, session.ordered(session.source), scan.labels, suspect & members, runtime=session.runtime)
            log.info("class %d: %d suspects, imprint %.2f", group.label, (suspect & members).sum(), rise)
            group = dataclasses.replace(group, imprint=rise)
            if group.acquitted:
                suspect[members], doubt[members] = False, 0
        groups.append(group)
    return Selection(suspect, doubt, tuple(groups))


def _relabel(
    session: Session, scan: Scan, network: nn.Module, suspect: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    stage = session.recipe.relabel
    if not suspect.any():
        return scan.labels, np.ones(len(scan), dtype=np.float32)
    knobs: dict[str, Any] = dict(stage.params)
    if stage.name == "unlearned":
        knobs |= {"model": network, "loaders": session.relabel_loader, "runtime": session.runtime}
    else:
        encoder = network if stage.encoder is None else session.build(stage.encoder)
        scan = scan_model(
            encoder, session.ordered(session.source), scan.labels, runtime=session.runtime, fingerprint=scan.fingerprint
        )
        if stage.name == "trusted":
            verified = session.trusted_source
            seen = scan_model(encoder, session.ordered(verified), verified.labels, runtime=session.runtime)
            knobs |= {"features": seen.features, "labels": seen.labels}
    return relabelers.create(stage.name, **knobs).relabel(scan, suspect)
