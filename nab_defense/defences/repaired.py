"""Purifiers as defences: ordinary training, then a repair with trusted images."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from ..purify import purifiers, purify
from ..repair import read_clean
from .base import Outcome, Task, defences

__all__ = ["Repaired"]


@defences.register("purify")
@dataclass(frozen=True)
class Repaired:
    """One of this package's purifiers on the undefended network, with all the trusted images of the task.

    The note says what `nab purify` would: repaired, not repaired (the better network is taken all the same), or rejected, in
    which case the network stays as it was; why it stopped; and the share that universal perturbations turned before and after.

    Args:
        method: Any that `nab purify` knows.
        settings: Its settings; those left out keep their defaults.
    """

    method: str = "ibau"
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.settings, dict):
            raise ValueError(f"settings must be keys and values, got {self.settings!r}")
        purifiers.create(self.method, **self.settings)

    @property
    def inner(self) -> dict[str, str]:
        return purifiers.defaults(self.method)

    def defend(self, task: Task) -> Outcome:
        session, method = task.session(), purifiers.create(self.method, **self.settings)
        begun, (mean, std), recipe = time.perf_counter(), session.normalization, task.recipe
        _, images = read_clean(
            task.clean, size=session.size, limit=None, labelled=method.labelled, hflip=recipe.train.hflip, seed=recipe.seed
        )
        found = purify(task.undefended, images, method, mean=mean, std=std, runtime=session.runtime)
        seconds = {"train": task.plain_seconds, "purify": time.perf_counter() - begun}
        told = "repaired" if found.repaired else "not repaired" if found.status == "accepted" else found.status
        turned = f"universal perturbations turned {found.before['proxy']:.2f}, then {found.after['proxy']:.2f}"
        note = ": ".join(part for part in (told, found.chosen, found.stopped, turned) if part is not None)
        return Outcome(found.model, seconds, note=note)
