"""No defence: ordinary training."""

from __future__ import annotations

from dataclasses import dataclass

from ..types import NABPlan
from .base import Outcome, Task, defences

__all__ = ["Undefended"]


@defences.register("none")
@dataclass(frozen=True)
class Undefended:
    """What everything else is compared with."""

    def defend(self, task: Task) -> Outcome:
        return Outcome(task.undefended, {"train": task.plain_seconds}, NABPlan.empty(task.source.labels))
