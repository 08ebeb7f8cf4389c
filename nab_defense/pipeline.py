"""run: source -> scan -> detect -> select -> relabel -> plan -> wrap -> fit -> check -> evaluate."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from . import checkpoint, io
from .bench.evaluate import evaluate
from .check import Verdict, imprint, judge, measure
from .defended import DefendedModel
from .detectors import detectors
from .detectors.lga import lga_loss
from .plan import Finding, clean_label_groups, load_finding, make_plan, paper_plan, save_finding
from .relabel import relabelers
from .result import describe, save_suspects
from .scan import EarlyScan, Scan, scan_model
from .schema import Recipe
from .select import Selection, expand, settled, take_fraction
from .session import Session, train_config
from .train import TrainConfig, fit
from .types import EvalResult, NABPlan

__all__ = ["detect", "run"]

log = logging.getLogger(__name__)
IMPRINT_LIMIT = 0.5  # share of other images that what a clean-label group shares must turn to be called a trigger


def run(recipe: Recipe, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """Defended training, from a source to a model that carries its stamp.

    Args:
        recipe: What to do.
        out: Folder for model.safetensors, plan.npz, suspects.csv, recipe.yaml, result.json.
        resume: Go on with what an interrupted run of the same recipe left there.

    Returns:
        The content of result.json.

    Raises:
        ValueError: The recipe or its data cannot be used; nothing was lost.
    """
    session = Session(recipe, out, resume=resume)
    cases = session.cases()  # opened first, so that a wrong test set costs no training
    twins = _twins(session)
    session.rehearse()
    done = session.claim()
    if done is not None:
        return done
    clock = _Clock(session)
    finding = clock("scan", lambda: _remembered(session))
    log.info("%d suspects", finding.plan.suspect.sum())
    network = clock("train", lambda: train(session, finding.plan, "defended"))
    shipped = defend(session, network, finding.plan)
    verdict = clock("check", lambda: check(session, shipped, network, finding.plan))
    models: dict[str, EvalResult | tuple[EvalResult, EvalResult]] = {}
    for arm, plan in twins:
        same = np.array_equal(plan.changed, finding.plan.changed) and not plan.changed.any()
        twin = network if same else clock(arm, lambda arm=arm, plan=plan: train(session, plan, arm))  # type: ignore[misc]
        if cases is not None:
            models[arm] = evaluate(twin, cases, session.runtime)
    if cases is not None:
        models["defended"] = evaluate(shipped, cases, session.runtime), evaluate(network, cases, session.runtime)
    result = describe(session, finding, verdict, models, clock.seconds)
    mean, std = session.normalization
    header = {"classes": session.source.classes, "input_size": session.size, "verdict": dataclasses.asdict(verdict)}
    # All at the end: a run that fails leaves whatever an earlier one shipped here, and no mixture of both.
    checkpoint.save(out / "model.safetensors", shipped, session.network(), mean=mean, std=std, **header)
    save_finding(out / "plan.npz", finding)
    save_suspects(out / "suspects.csv", finding, session.source)
    io.save_yaml(out / "recipe.yaml", session.settings)
    io.save_json(out / "result.json", result)
    io.save_json(session.finished, True)
    return result


class _Clock:
    """Seconds of each stage, kept on disk so that a resumed run still reports what it took."""

    def __init__(self, session: Session) -> None:
        self.path = session.stages / "seconds.json"
        self.seconds: dict[str, float] = io.load_json(self.path) if self.path.exists() else {}

    def __call__(self, stage: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        value = work()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started
        io.save_json(self.path, self.seconds)
        return value


def _twins(session: Session) -> list[tuple[str, NABPlan]]:
    """Plans of the networks trained for comparison: nothing changed, and the true poison removed."""
    labels, truth, twins = session.source.labels, session.truth, []
    if "undefended" in session.recipe.baselines:
        twins.append(("undefended", NABPlan.empty(labels)))
    if "oracle" in session.recipe.baselines:
        if truth is None:
            raise ValueError("the oracle twin needs the truth: set data.truth, or leave oracle out of baselines")
        twins.append(("oracle", dataclasses.replace(NABPlan.empty(labels), keep=~truth.poisoned)))
    return twins


def _remembered(session: Session) -> Finding:
    """The finding of an interrupted run of this recipe, or a new one."""
    path = session.stages / "plan.npz"
    if session.resume and path.exists():
        finding = load_finding(path)
        finding.plan.check_matches(len(session.source), session.source.fingerprint)
        return finding
    finding = detect(session)
    save_finding(path, finding)
    return finding


def detect(session: Session) -> Finding:
    """Scan the training source, rank, select, relabel, plan. Sees images and given labels only."""
    recipe = session.recipe
    detector = detectors.create(recipe.scan.detector, **recipe.scan.params)

    found: list[Selection] = []

    def look(seen: Scan) -> bool:
        last = found[-1] if found else None
        found.append(expand(detector.detect(seen), seen, fraction=recipe.fraction, previous=last))
        log.info("scan %d: %d suspects", seen.epoch, found[-1].suspect.sum())
        return last is not None and settled(last, found[-1])

    scan, network = _scan(session, look)
    report = detector.detect(scan)
    selection = found[-1] if recipe.rule == "expand" else take_fraction(report, recipe.fraction)
    proposed, confidence = _relabel(session, scan, network, selection.suspect)
    if recipe.rule == "expand":
        selection = _confirmed(session, selection, scan, network, proposed)
    if recipe.rule == "paper":
        plan = paper_plan(scan, selection.suspect, proposed)
    else:
        plan = make_plan(
            scan, selection.suspect, np.where(selection.suspect, proposed, scan.labels), confidence, doubt=selection.doubt,
            min_confidence=recipe.relabel.min_confidence, cover_fraction=recipe.relabel.cover_fraction, seed=recipe.seed,
        )  # fmt: skip
    return Finding(report, selection, plan, confidence)


def _scan(session: Session, look: Callable[[Scan], bool]) -> tuple[Scan, nn.Module]:
    source, stage = session.source, session.recipe.scan
    network = session.build()
    settings = TrainConfig(
        epochs=stage.epochs, batch_size=stage.batch_size, lr=stage.lr, momentum=stage.momentum,
        weight_decay=stage.weight_decay, sched="none",
    )  # fmt: skip
    loss = lga_loss(stage.gamma, stage.form)
    watch = EarlyScan(session.ordered(source), source.labels, look=look, runtime=session.runtime, fingerprint=source.fingerprint)
    fit(network, session.scan_loader(source), runtime=session.runtime, train=settings, loss=loss, after_epoch=watch, title="scan")
    assert watch.last is not None  # fit runs at least one epoch
    return watch.last, network


def _confirmed(session: Session, selection: Selection, scan: Scan, network: nn.Module, proposed: NDArray[np.int64]) -> Selection:
    """Acquit groups whose labels agree with their content, unless what they share works as a trigger on the scan's network."""
    suspect = selection.suspect.copy()
    for group in clean_label_groups(scan.labels, proposed, suspect):
        rise = imprint(network, session.ordered(session.source), scan.labels, group, runtime=session.runtime)
        log.info("class %d: %d suspects agree with their label, imprint %.2f", scan.labels[group][0], group.sum(), rise)
        if rise < IMPRINT_LIMIT:
            suspect[group] = False
    return dataclasses.replace(selection, suspect=suspect)


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


def train(session: Session, plan: NABPlan, arm: str) -> nn.Module:
    """Train one arm of the run: the same start, schedule and randomness, under a plan."""
    network = session.build()
    loader = session.train_loader(session.source, plan)
    state = session.stages / f"{arm}.state"
    fit(
        network,
        loader,
        runtime=session.runtime,
        train=train_config(session.recipe.train),
        state=state,
        resume=session.resume,
        title=arm,
    )
    return network


def defend(session: Session, network: nn.Module, plan: NABPlan) -> nn.Module:
    """The network as it is shipped: with its stamp, or as it is where training never saw one."""
    if not (plan.stamped & plan.keep).any():
        return network
    mean, std = session.normalization
    return DefendedModel(network, session.stamp, mean=mean, std=std)


def check(session: Session, shipped: nn.Module, network: nn.Module, plan: NABPlan) -> Verdict:
    """The verdict on a trained model; no truth is read."""
    survival = measure(shipped, network, session.ordered(session.source), plan, runtime=session.runtime)
    return judge(plan, survival, session.source.classes)
