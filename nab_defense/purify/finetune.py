"""Fine-tuning on the clean images: the baseline that every purifier has to beat."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..clean import CleanSet, Pixels
from ..kept import Kept
from ..runtime import Runtime
from ..universal import Pool
from .base import Candidates, Notes, check_finite, fine_tuned, in_range, purifiers

__all__ = ["FineTune"]


@purifiers.register("finetune")
@dataclass(frozen=True)
class FineTune:
    """Ordinary training of all weights, batch statistics and dropout included; SGD whose rate falls to zero along a cosine.

    Args:
        steps: Optimizer steps.
        rounds: Candidates, at equal distances up to the end.
        batch_size: Images a step.
        lr, momentum, weight_decay: Of SGD.
        augment: Random crops and flips.
    """

    labelled: ClassVar[bool] = True
    least: ClassVar[int] = 20

    steps: int = 400
    rounds: int = 4
    batch_size: int = 128
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: bool = True

    def __post_init__(self) -> None:
        in_range(self, "steps", "rounds", "batch_size", low=1)
        in_range(self, "lr", low=0, ends="()")
        in_range(self, "weight_decay", low=0)
        in_range(self, "momentum", low=0, high=1)

    def check(self, network: Pixels, images: Tensor) -> None:
        """It serves every network that runs, in training too."""
        copy.deepcopy(network).train()(images)

    def candidates(
        self, network: Pixels, clean: CleanSet, *, pool: Pool, runtime: Runtime, notes: Notes, kept: Kept
    ) -> Candidates:
        def slope(images: Tensor, labels: Tensor, step: int) -> None:
            with runtime.autocast():
                loss = F.cross_entropy(network(images), labels)
            check_finite(loss, "finetune", step)
            network.zero_grad()
            loss.backward()

        return fine_tuned(self, network, clean, slope, runtime=runtime, kept=kept)
