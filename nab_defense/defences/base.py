"""What a defence is given, and what it gives back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..data import Source
from ..pipeline import train
from ..registry import Registry
from ..schema import Recipe
from ..session import Session
from ..train import TrainConfig
from ..types import NABPlan

__all__ = ["Defence", "Outcome", "Task", "defences"]


@dataclass(frozen=True, eq=False)
class Task:
    """Everything that a defence may know.

    Args:
        recipe: Network, schedule, scan, stamp, normalisation, seed; it names no attack, no truth and no test set.
        source: The training images with the labels that came with them, held in memory.
        clean: Trusted images with labels, none of them in `source`; for defences that ask for such.
        undefended: What ordinary training on `source` gives, the same for all defences; not to be changed.
        plain_seconds: What that training took.
        folder: For files of its own; empty.
        shared: What defences of the same task computed alike, see `remember`.
    """

    recipe: Recipe
    source: Source
    clean: Source
    undefended: nn.Module
    plain_seconds: float
    folder: Path
    shared: dict[str, tuple[Any, float]] = field(default_factory=dict)

    def session(self, *, source: Source | None = None, **changes: Any) -> Session:
        """A session on the training images.

        Args:
            source: Other images in their place.
            changes: Keys of the recipe to replace.

        Raises:
            ValueError: A setting that no stage can use."""
        session = Session(self.recipe.model_copy(update=changes), self.folder, resume=False)
        session.whole_source = self.source if source is None else source
        session.rehearse()
        return session

    def remember(self, name: str, make: Callable[[], Any]) -> tuple[Any, float]:
        """What `make` gives, and the seconds it took; made once for all defences that ask for it by this name, with the same
        settings of the scan.

        It must follow from the task alone, and nobody may change it."""
        key = name + self.recipe.model_dump_json(include={"scan", "fraction", "relabel"})
        if key not in self.shared:
            begun = time.perf_counter()
            self.shared[key] = make(), time.perf_counter() - begun
        return self.shared[key]

    def fitted(
        self, session: Session, plan: NABPlan, arm: str, *, how: TrainConfig | None = None, augment: str | None = None
    ) -> tuple[nn.Module, float]:
        """A network trained under a plan for this task's source, and its seconds; where the plan changes nothing that is the
        undefended one, weight by weight, and is not trained again.

        Args: how, augment: Another schedule and augmentation than the recipe's."""
        if not plan.changed.any():
            return self.undefended, self.plain_seconds
        begun = time.perf_counter()
        return train(session, plan, arm, how=how, augment=augment, kept=False), time.perf_counter() - begun


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a defence gives back.

    Args:
        model: What it would ship; takes normalised images (B, C, H, W).
        seconds: Of each stage, ordinary training included where the defence needs it.
        plan: What it changed in the training data; None: it did not go sample by sample.
        scores: (N,) how suspicious each training image is to it, higher = more; None: it does not rank.
        note: A line on what came of it, e.g. that a repair was rejected.
    """

    model: nn.Module
    seconds: dict[str, float]
    plan: NABPlan | None = None
    scores: NDArray[np.float32] | None = None
    note: str = ""


class Defence(Protocol):
    """A way to a network that does not obey triggers.

    One that runs another registered method has a property `inner` with that method's defaults, which its results hang on, too."""

    def defend(self, task: Task) -> Outcome:
        """Raises: ValueError: It cannot serve this task; the line says why."""
        ...


defences: Registry[Defence] = Registry("defence")
