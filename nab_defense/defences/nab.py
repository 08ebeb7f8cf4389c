"""This package's own rule and the textbook's, as `nab train` runs them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..detectors import detectors
from ..look import accuse, look, scan_whole
from ..pipeline import Clock, defend, protect
from ..train import TrainConfig
from ..types import NABPlan
from .base import Outcome, Task, defences

__all__ = ["NAB", "NABPaper"]


@defences.register("nab", source="this package")
@dataclass(frozen=True)
class NAB:
    """Scan, expand, relabel, drop, stamp, train; where nothing is found, look again with the trained network."""

    def defend(self, task: Task) -> Outcome:
        session = task.session(rule="expand")
        clock = Clock(session)
        first, seconds = task.remember("look", lambda: look(session))
        clock.add("scan", seconds)

        def fitted(plan: NABPlan, arm: str, *, how: TrainConfig | None = None) -> nn.Module:
            if plan.changed.any():
                return task.fitted(session, plan, arm, how=how)[0]
            clock.add("train", task.plain_seconds)
            return task.undefended

        finding, network, _ = protect(session, clock, first=lambda: first, fitted=fitted)
        return Outcome(defend(session, network, finding.plan), clock.seconds, finding.plan, finding.ranking)


@defences.register("nab_paper", source="arXiv:2307.15539")
@dataclass(frozen=True)
class NABPaper:
    """The textbook rule: a detector's top fraction of a whole scan is relabelled and stamped, whatever it holds.

    The fraction and the relabeller are the recipe's; the authors label by networks trained on clean data or without labels.

    Args:
        detector: Any that `nab scan` knows, with its default settings.
    """

    detector: str = "lga"

    def __post_init__(self) -> None:
        detectors.create(self.detector)

    @property
    def inner(self) -> dict[str, str]:
        return detectors.defaults(self.detector)

    def defend(self, task: Task) -> Outcome:
        scan = task.recipe.scan.model_copy(update={"detector": self.detector, "params": {}})
        session = task.session(rule="paper", scan=scan)
        clock = Clock(session)
        (seen, network), seconds = task.remember("scan", lambda: scan_whole(session))
        clock.add("scan", seconds)
        finding = clock("scan", lambda: accuse(session, seen, network))
        trained, seconds = task.fitted(session, finding.plan, "defended")
        clock.add("train", seconds)
        return Outcome(defend(session, trained, finding.plan), clock.seconds, finding.plan, finding.ranking)
