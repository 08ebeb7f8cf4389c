"""run: source -> scan -> detect -> select -> relabel -> plan -> wrap -> fit -> check -> (purify) -> evaluate."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from . import checkpoint, io, ranks
from .again import look_again
from .bench.evaluate import evaluate
from .check import Verdict, judge, judge_again, measure, small_classes
from .defended import DefendedModel
from .look import look
from .plan import Finding, load_finding, save_finding
from .repair import Repair, Trusted, repair, trusted_images
from .result import describe, save_suspects
from .schema import Recipe
from .session import Session
from .train import TrainConfig, fit
from .types import EvalResult, NABPlan

__all__ = ["Clock", "defend", "protect", "run", "train"]

log = logging.getLogger(__name__)
AGAIN = 3  # looks with a trained network; each that finds something costs a training
# Epochs, or steps on all images where that is more, of networks that only name content and are thrown away; .6 of the images and
# 1,700 steps were enough for the folds of 12,000 CIFAR-10 images, 250 too few for those of 1,300 digits.
BRIEF = 30, 3000


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
    trusted = trusted_images(session)
    read = _inputs(session, trusted)
    done = session.claim(read)
    if done is not None:
        return done
    clock = Clock(session)
    finding, network, untouched = protect(session, clock, first=lambda: _first(session), fitted=partial(train, session))
    defended = defend(session, network, finding.plan)
    verdict = clock("check", lambda: check(session, defended, network, finding))
    shipped, verdict, purified = _repaired(session, clock, trusted, defended, verdict, finding.plan)
    models: dict[str, EvalResult | tuple[EvalResult, EvalResult]] = {}
    for arm, plan in twins:
        if untouched is not None and not plan.changed.any():
            twin = untouched
        else:
            twin = clock(arm, lambda arm=arm, plan=plan: train(session, plan, arm))  # type: ignore[misc]
        if cases is not None:
            models[arm] = evaluate(twin, cases, session.runtime)
    if cases is not None:
        models["defended"] = evaluate(defended, cases, session.runtime), evaluate(network, cases, session.runtime)
        if shipped is not defended:
            models["purified"] = evaluate(shipped, cases, session.runtime)
    result = describe(session, finding, verdict, models, clock.seconds, purified)
    mean, std = session.normalization
    header = {"classes": session.source.classes, "input_size": session.size, "verdict": dataclasses.asdict(verdict)}
    # All at the end: a run that fails leaves whatever an earlier one shipped here, and no mixture of both.
    checkpoint.save(out / "model.safetensors", shipped, session.network(), mean=mean, std=std, **header)
    save_finding(out / "plan.npz", finding)
    save_suspects(out / "suspects.csv", finding, session.source)
    session.save_trigger()
    io.save_yaml(out / "recipe.yaml", session.settings)
    io.save_json(out / "result.json", result)
    io.save_json(session.finished, read)
    return result


def _inputs(session: Session, trusted: Trusted | None) -> dict[str, str]:
    """Fingerprints of the images and the truth that a run reads, by their keys in the recipe."""
    data, read = session.recipe.data, {"data.source": session.source.fingerprint}
    if data.test is not None:
        read["data.test"] = session.test_source.fingerprint
    if data.truth is not None:
        read["data.truth"] = io.file_hash(Path(data.truth).expanduser())
    if session.recipe.relabel.trusted is not None:
        read["relabel.trusted"] = session.trusted_source.fingerprint
    return read if trusted is None else {**read, "purify.clean": trusted.fingerprint}


class Clock:
    """Seconds of each stage that ended, kept on disk for a resumed run; of one that was killed what it took after that counts."""

    def __init__(self, session: Session) -> None:
        self.path = session.stages / "seconds.json"
        self.seconds: dict[str, float] = io.load_json(self.path) if self.path.exists() else {}

    def __call__(self, stage: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        value = work()
        self.add(stage, time.perf_counter() - started)
        return value

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        io.save_json(self.path, self.seconds)


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


def protect(
    session: Session,
    clock: Clock,
    *,
    first: Callable[[], tuple[Finding, nn.Module]],
    fitted: Callable[..., nn.Module],
) -> tuple[Finding, nn.Module, nn.Module | None]:
    """Look and train; look again with the trained network, and train anew if that finds something more.

    Args:
        first: Gives the first look and the scan's network.
        fitted: (plan, name of the arm, how=TrainConfig, augment=name) -> a network trained under the plan; without `how` and
            `augment` as it is shipped.

    Returns: what was found, the network to ship, and the one that ordinary training gave, where there is one."""
    finding, scanner = clock("scan", first)
    log.info("%d suspects", finding.plan.suspect.sum())
    network = clock("train", lambda: fitted(finding.plan, "defended"))
    untouched = None if finding.plan.changed.any() else network
    if session.recipe.rule != "expand":
        return finding, network, untouched
    for turn in range(AGAIN):
        without = partial(_without, partial(fitted, how=_brief(session)), finding.plan, f"again{turn}")
        make = partial(look_again, session, network, scanner, finding, without=without)
        found = clock("scan", partial(_remembered, session, f"again{turn}", make))
        ranks.on_first(partial(_forget, session.stages, f"again{turn}"))
        more = (found.plan.suspect & ~finding.plan.suspect).any()
        finding = found
        if not more:
            break
        network = clock("train", partial(fitted, found.plan, f"retrained{turn}"))
    return finding, network, untouched


def _brief(session: Session) -> TrainConfig:
    """The recipe's schedule, in fewer epochs where it is long."""
    epochs, steps = BRIEF
    batch = session.schedule.batch_size * session.schedule.grad_accum_steps
    return session.schedule.shortened(max(epochs, math.ceil(steps * batch / len(session.source))))


def _forget(stages: Path, turn: str) -> None:
    """Drop the states of networks that have told what they were asked."""
    for path in stages.glob(f"{turn}_without_*.state"):
        path.unlink()


def _without(
    fitted: Callable[..., nn.Module],
    plan: NABPlan,
    turn: str,
    absent: NDArray[np.bool_],
    part: str,
    augment: str | None = None,
) -> nn.Module:
    """A network trained on the rest as it came, augmented as the recipe says by default. Its state is named after what it never
    saw: another processor may leave out others, and has no use for it."""
    rest = dataclasses.replace(NABPlan.empty(plan.labels), keep=~absent)
    return fitted(rest, f"{turn}_without_{part}-{rest.mark('')}", augment=augment)


def _repaired(
    session: Session, clock: Clock, trusted: Trusted | None, shipped: nn.Module, verdict: Verdict, plan: NABPlan
) -> tuple[nn.Module, Verdict, dict[str, Any] | None]:
    """Repair what is to be shipped, where the recipe says so, and check it again.

    Returns: what is shipped now, the verdict on it, and what result.json says of the repair; None where none was asked for."""
    stage = session.recipe.purify
    if trusted is None or (trusted.stage.when == "unprotected" and verdict.protected):
        return shipped, verdict, None if stage is None else {"status": "skipped", "when": stage.when}
    made = clock("purify", lambda: repair(session, trusted, shipped, plan))
    if not made.accepted:
        return shipped, dataclasses.replace(verdict, text=f"{verdict.text} {made.record['text']}"), made.record
    again = clock("check", lambda: check_again(session, made, plan, verdict))
    return made.model, again, made.record


def _first(session: Session) -> tuple[Finding, nn.Module]:
    """The first look, and the scan's network; both from an interrupted run of this recipe where it left them."""
    network, state = session.build(session.recipe.scan.model), session.stages / "scan.state"

    def fresh() -> Finding:
        finding, scanner = look(session)
        io.save_state(state, scanner.state_dict())
        return finding

    finding = _remembered(session, "plan", fresh)
    network.load_state_dict(io.load_state(state))
    return finding, network


def _remembered(session: Session, name: str, make: Callable[[], Finding]) -> Finding:
    """The finding that an interrupted run of this recipe left under this name, or a new one."""
    path = session.stages / f"{name}.npz"
    if not ranks.same(session.resume and path.exists()):
        save_finding(path, make())
    finding = load_finding(path)  # also a new one: of several ranks, all go on with what the first one found
    finding.plan.check_matches(len(session.source), session.source.fingerprint)
    return finding


def train(
    session: Session,
    plan: NABPlan,
    arm: str,
    *,
    how: TrainConfig | None = None,
    augment: str | None = None,
    kept: bool = True,
) -> nn.Module:
    """Train one arm of the run: the same start, schedule and randomness, under a plan.

    Args:
        how, augment: Another schedule and augmentation than the recipe's.
        kept: Leave the state after each epoch in the run's folder, for who may resume it."""
    network = session.build()
    loader = session.train_loader(plan, augment or session.recipe.train.augment)
    state = session.stages / f"{arm}.state" if kept else None
    fit(
        network,
        loader,
        runtime=session.runtime,
        train=how or session.schedule,
        state=state,
        resume=session.resume,
        split=True,
        title=arm.partition("-")[0],
        about=plan.mark(session.source.fingerprint),
    )
    return network


def defend(session: Session, network: nn.Module, plan: NABPlan) -> nn.Module:
    """The network as it is shipped: with its stamp, or as it is where training never saw one."""
    if not (plan.stamped & plan.keep).any():
        return network
    mean, std = session.normalization
    return DefendedModel(network, session.stamp, mean=mean, std=std)


def check(session: Session, shipped: nn.Module, network: nn.Module, finding: Finding) -> Verdict:
    """The verdict on a trained model; no truth is read."""
    plan = finding.plan
    survival = measure(shipped, network, session.ordered(session.source), plan, runtime=session.runtime)
    classes, groups, again = session.source.classes, finding.selection.groups, finding.looked_again
    small = small_classes(plan.labels, len(classes)) if session.recipe.rule == "expand" else 0
    return judge(plan, survival, classes, groups=groups, small=small, looked_again=again)


def check_again(session: Session, made: Repair, plan: NABPlan, first: Verdict) -> Verdict:
    """The verdict on a repaired model, after that on the original; no truth is read."""
    repaired = made.model
    network = repaired.model if isinstance(repaired, DefendedModel) else repaired
    survival = measure(repaired, network, session.ordered(session.source), plan, runtime=session.runtime)
    return judge_again(first, plan, survival, repair=made.record["text"], believed=made.believed)
