"""Drop the suspects and train on the rest: what a scan is worth without stamps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..look import look
from ..types import NABPlan
from .base import Outcome, Task, defences

__all__ = ["Drop"]


@defences.register("drop", source="this package's scan")
@dataclass(frozen=True)
class Drop:
    """The suspects of the default scan's first look are left out of ordinary training."""

    def defend(self, task: Task) -> Outcome:
        session = task.session(rule="expand")
        (finding, _), seconds = task.remember("look", lambda: look(session))
        plan = dataclasses.replace(NABPlan.empty(task.source.labels), suspect=finding.plan.suspect, keep=~finding.plan.suspect)
        network, training = task.fitted(session, plan, "dropped")
        return Outcome(network, {"scan": seconds, "train": training}, plan, finding.ranking)
