"""ABL: isolate what is learned fastest, then unlearn it [Li et al. 2021, arXiv:2110.11571]."""

from __future__ import annotations

import copy
import dataclasses
import time
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ..detectors import detectors
from ..look import scan_whole
from ..train import TrainConfig, fit
from ..types import NABPlan
from .base import Outcome, Task, defences

__all__ = ["ABL", "ascent"]

BATCH = 64


def ascent(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the cross-entropy, so that training climbs it [eq. 5, the isolated part]; without an end, as in the paper.

    Args: logits: (B, K). labels: (B,)."""
    return -F.cross_entropy(logits, labels)


@defences.register("abl", source="arXiv:2110.11571")
@dataclass(frozen=True)
class ABL:
    """The lowest losses of a scan under the LGA loss are isolated; the trained network climbs the loss on them.

    We leave the paper where the network to be unlearned is trained on all images, not on all but the isolated ones, which hold
    a small part of the poison: so it is the undefended one, the same for all defences. As in the authors' code it only climbs,
    where eq. 5 descends on the rest, too; and the first training is the recipe's scan, its epochs, batches and learning rate.

    Args:
        fraction: Isolated share; .01 in the paper.
        steps: Of unlearning, on batches of 64 images as they are, at least so many; the authors' code takes four passes over the
            500 images that it isolates.
        lr: Of it, 5e-4 in the paper.
    """

    fraction: float = 0.01
    steps: int = 32
    lr: float = 5e-4

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction must be in (0, 1), got {self.fraction}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        self._settings(self.steps)  # refuse settings that cannot be used

    def _settings(self, epochs: int) -> TrainConfig:
        return TrainConfig(epochs=epochs, batch_size=BATCH, lr=self.lr, weight_decay=1e-4, sched="none")

    def defend(self, task: Task) -> Outcome:
        session = task.session(rule="paper")
        (seen, _), scanning = task.remember("scan", lambda: scan_whole(session))
        report = detectors.create("lga").detect(seen)
        isolated = report.select(self.fraction)
        if not isolated.any():
            raise ValueError(f"fraction={self.fraction} of {len(isolated)} images isolates none; raise it")
        source = task.source.subset(np.flatnonzero(isolated))
        loader = session.loaders(source, "none", BATCH, training=True)
        network, begun = copy.deepcopy(task.undefended), time.perf_counter()
        settings = self._settings(-(-self.steps // len(loader)))
        fit(network, loader, runtime=session.runtime, train=settings, loss=ascent, title="unlearn")
        seconds = {"scan": scanning, "train": task.plain_seconds, "unlearn": time.perf_counter() - begun}
        plan = dataclasses.replace(NABPlan.empty(task.source.labels), suspect=isolated, keep=~isolated)
        return Outcome(network, seconds, plan, report.scores)
