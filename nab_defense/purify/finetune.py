"""Fine-tuning on the clean images: the baseline that every purifier has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clean import CleanSet, Pixels
from ..runtime import Runtime
from .base import Candidates, check_finite, purifiers

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

    def check(self, network: Pixels, images: Tensor) -> None:
        network(images)

    def candidates(self, network: Pixels, clean: CleanSet, *, runtime: Runtime) -> Candidates:
        assert clean.labels is not None
        network.requires_grad_(True)
        optimizer = torch.optim.SGD(network.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        batches = clean.endless(self.batch_size, runtime=runtime, seed=runtime.seed, augment=self.augment)
        for step in range(1, self.steps + 1):
            images, rows = next(batches)
            network.train()
            with runtime.autocast():
                loss = F.cross_entropy(network(images), clean.labels[rows].to(images.device))
            check_finite(loss.detach(), "finetune", step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step * self.rounds // self.steps > (step - 1) * self.rounds // self.steps:
                yield f"step {step}", network
