"""A copy of the scan's network forgets the suspects, then labels them by what is left: their content."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..content import label_by_content
from ..runtime import Runtime
from ..scan import Scan
from ..train import TrainConfig, fit
from .base import merge, relabelers, trusted_rows

__all__ = ["Unlearned", "unlearning_loss"]

# (labels, keep, training) -> loader over the scanned images with these labels, without those not kept
Loaders = Callable[[NDArray[np.int64], NDArray[np.bool_], bool], Any]


def unlearning_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy on the rest; on suspects ascent on the cross-entropy [ABL, arXiv:2110.11571, eq. 5].

    ABL's ascent has no end and wrecks the network with it. Here it stops at ln K, the loss of a guess: the suspects' link
    to their label is undone, not turned into its opposite.

    Args: logits: (B, K). labels: (B,) as given, plus K where the sample is a suspect.
    Returns: scalar, >= 0."""
    num_classes = logits.shape[1]
    losses = F.cross_entropy(logits, labels % num_classes, reduction="none")
    return torch.where(labels >= num_classes, (math.log(num_classes) - losses).clamp(min=0), losses).mean()


@relabelers.register("unlearned", source="arXiv:2110.11571")
@dataclass(frozen=True, eq=False)
class Unlearned:
    """Needs neither clean data nor self-supervision.

    One epoch unlearns the suspects, the others train on the rest alone, so that suspects whose content does agree with
    their label (clean-label poison, innocents) get it back. See label_by_content for what the network then proposes.

    Args:
        model: The scan's network; it is copied.
        loaders: Gives loaders over the scanned images.
        runtime: Device, precision, seed.
        epochs: Epochs on the rest after the one of unlearning.
        lr: Of both phases; SGD with momentum .9, the learning rate falling to zero in the second.
        unseen: The model was trained without the suspects: it has nothing to forget, and names them as it is.
    """

    model: nn.Module
    loaders: Loaders
    runtime: Runtime
    epochs: int = 4
    lr: float = 0.05
    unseen: bool = False

    def __post_init__(self) -> None:
        self._phase(self.epochs, "cosine")  # refuses settings that cannot be, before anything is scanned

    def _phase(self, epochs: int, sched: str) -> TrainConfig:
        return TrainConfig(epochs=epochs, lr=self.lr, sched=sched)

    def relabel(self, scan: Scan, suspect: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See Relabeler; confidence is the network's probability of the proposed label."""
        if not suspect.any():
            return merge(scan, suspect, np.zeros(0, np.int64), np.zeros(0, np.float32))
        model = self.model if self.unseen else self._without_trigger(scan, suspect)

        def plain(keep: NDArray[np.bool_]) -> Any:
            return self.loaders(scan.labels, keep, False)

        return merge(scan, suspect, *label_by_content(model, plain, scan.labels, suspect, runtime=self.runtime))

    def _without_trigger(self, scan: Scan, suspect: NDArray[np.bool_]) -> nn.Module:
        """A copy that forgot the suspects."""
        trusted_rows(scan, suspect)  # refuses to go on where a class has no sample left
        model, everything = copy.deepcopy(self.model), np.ones(len(scan), dtype=bool)
        marked = self.loaders(scan.labels + scan.num_classes * suspect, everything, True)
        forget, recover = self._phase(1, "none"), self._phase(self.epochs, "cosine")
        fit(model, marked, runtime=self.runtime, train=forget, loss=unlearning_loss, title="unlearn")
        fit(model, self.loaders(scan.labels, ~suspect, True), runtime=self.runtime, train=recover, title="recover")
        return model
