"""This package's own rule and the textbook's, as `nab train` runs them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..data import Source
from ..detectors import detectors
from ..look import accuse, look, scan_whole
from ..pipeline import Clock, defend, protect
from ..plan import paper_plan
from ..scan import scan_model
from ..session import Session
from ..train import fit
from ..types import NABPlan
from .base import Outcome, Task, defences

__all__ = ["NAB", "NABPaper"]


@defences.register("nab", source="this package")
@dataclass(frozen=True)
class NAB:
    """Scan, expand, relabel, drop, stamp, train, and look again with the trained network, as `nab train` does."""

    def defend(self, task: Task) -> Outcome:
        session = task.session(rule="expand")
        clock = Clock(session)
        first, seconds = task.remember("look", lambda: look(session))
        clock.add("scan", seconds)

        def fitted(plan: NABPlan, arm: str, **otherwise: Any) -> nn.Module:
            network, seconds = task.fitted(session, plan, arm, **otherwise)
            if network is task.undefended:  # whose training the clock did not see
                clock.add("train", seconds)
            return network

        finding, network, _ = protect(session, clock, first=lambda: first, fitted=fitted)
        return Outcome(defend(session, network, finding.plan), clock.seconds, finding.plan, finding.ranking)


@defences.register("nab_paper", source="arXiv:2307.15539")
@dataclass(frozen=True)
class NABPaper:
    """The textbook rule: a detector's top fraction of a whole scan is relabelled and stamped, whatever it holds.

    Args:
        detector: Any that `nab scan` knows, with its default settings. All read the network of the scan, trained under the LGA
            loss, where the papers of spectral and activation_clustering read the finished poisoned one.
        labels: "trusted": by a network trained on the task's trusted images alone, for as many steps as the recipe's training
            takes, as the paper's VD does with a twentieth of the training set; the authors' code names stamped images, ours plain
            ones. "recipe": by the recipe's relabeller, which needs no such images; this is `rule: paper` of `nab train`.
    """

    detector: str = "lga"
    labels: str = "trusted"

    def __post_init__(self) -> None:
        detectors.create(self.detector)
        if self.labels not in ("trusted", "recipe"):
            raise ValueError(f"labels must be trusted or recipe, got {self.labels!r}")

    @property
    def inner(self) -> dict[str, str]:
        return detectors.defaults(self.detector)

    def defend(self, task: Task) -> Outcome:
        scan = task.recipe.scan.model_copy(update={"detector": self.detector, "params": {}})
        session = task.session(rule="paper", scan=scan)
        clock = Clock(session)
        (seen, network), seconds = task.remember("scan", lambda: scan_whole(session))
        clock.add("scan", seconds)
        report = detectors.create(self.detector).detect(seen)
        if self.labels == "recipe":
            plan = clock("relabel", lambda: accuse(session, seen, network)).plan
        else:
            suspect, named = report.select(session.recipe.fraction), clock("relabel", lambda: _named(session, task.clean))
            plan = paper_plan(seen, suspect, np.where(suspect, named, seen.labels))
        trained, seconds = task.fitted(session, plan, "defended")
        clock.add("train", seconds)
        return Outcome(defend(session, trained, plan), clock.seconds, plan, report.scores)


def _named(session: Session, clean: Source) -> NDArray[np.int64]:
    """What a network trained on the trusted images calls the training images, (N,)."""
    network, how = session.build(), session.schedule
    loader = session.loaders(clean, session.recipe.train.augment, how.batch_size, training=True)
    longer = max(1, how.epochs * (len(session.source) // how.batch_size) // len(loader))
    fit(network, loader, runtime=session.runtime, train=dataclasses.replace(how, epochs=longer), title="trusted")
    seen = scan_model(network, session.ordered(session.source), session.source.labels, runtime=session.runtime)
    return np.asarray(seen.logits.argmax(1))
