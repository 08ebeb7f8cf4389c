"""FT-SAM: fine-tuning towards flat minima, where a few large weights hold no backdoor [Zhu et al. 2023, arXiv:2304.11823]."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clean import CleanSet, Pixels
from ..kept import Kept
from ..runtime import Runtime
from ..universal import Pool
from .base import Candidates, Notes, check_finite, fine_tuned, in_range, norms, purifiers

__all__ = ["FTSAM", "adaptive_climb"]


def adaptive_climb(weights: Sequence[Tensor], slopes: Sequence[Tensor], rho: float) -> list[Tensor]:
    """The change of each weight that raises the loss most, where a large weight may change more than a small one.

    With w all weights and g their gradient: rho w^2 g / ||w g||, so that the change divided by |w| has the norm rho
    [Kwon et al. 2021, arXiv:2102.11600, without its eta].

    Args:
        weights, slopes: Of equal shapes, pairwise.
        rho: Radius, > 0."""
    norm = torch.stack([(w * g).norm() for w, g in zip(weights, slopes, strict=True)]).norm().clamp_min(1e-12)
    return [rho / norm * w.square() * g for w, g in zip(weights, slopes, strict=True)]


@contextmanager
def still_statistics(network: nn.Module) -> Iterator[None]:
    """Within, training mode leaves the running mean and variance of batch normalisation as they are."""
    layers = list(norms(network).values())
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


@purifiers.register("ft_sam", source="arXiv:2304.11823")
@dataclass(frozen=True)
class FTSAM:
    """Each step climbs to the worst weights nearby, and descends by the gradient found there.

    Unlike the authors' code the rate falls along one cosine over all steps, where theirs swings up again several times.

    Args:
        steps: Optimizer steps, each of two forward and two backward passes.
        rounds: Candidates, at equal distances up to the end.
        batch_size: Images a step.
        lr, momentum, weight_decay: Of SGD.
        rho: How far to climb.
        smoothing: Of the labels.
        augment: Random crops and flips.
    """

    labelled: ClassVar[bool] = True
    least: ClassVar[int] = 20

    steps: int = 300
    rounds: int = 4
    batch_size: int = 128
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    rho: float = 2.0
    smoothing: float = 0.1
    augment: bool = True

    def __post_init__(self) -> None:
        in_range(self, "steps", "rounds", "batch_size", low=1)
        in_range(self, "lr", low=0, ends="()")
        in_range(self, "weight_decay", "rho", low=0)
        in_range(self, "momentum", "smoothing", low=0, high=1)

    def check(self, network: Pixels, images: Tensor) -> None:
        """It serves every network that runs, in training too."""
        copy.deepcopy(network).train()(images)

    def candidates(
        self, network: Pixels, clean: CleanSet, *, pool: Pool, runtime: Runtime, notes: Notes, kept: Kept
    ) -> Candidates:
        def slope(images: Tensor, labels: Tensor, step: int) -> None:
            self._accumulate(network, images, labels, runtime, step)
            with_grad = [p for p in network.parameters() if p.grad is not None]
            here = [p.detach().clone() for p in with_grad]
            climbs = adaptive_climb(here, [p.grad for p in with_grad if p.grad is not None], self.rho)
            for param, climb in zip(with_grad, climbs, strict=True):
                param.data.add_(climb)
            with still_statistics(network):
                self._accumulate(network, images, labels, runtime, step)
            for param, place in zip(with_grad, here, strict=True):
                param.data.copy_(place)

        return fine_tuned(self, network, clean, slope, runtime=runtime, kept=kept)

    def _accumulate(self, network: Pixels, images: Tensor, labels: Tensor, runtime: Runtime, step: int) -> None:
        """Set the gradients of all weights, at the place they are in now."""
        with runtime.autocast():
            loss = F.cross_entropy(network(images), labels, label_smoothing=self.smoothing)
        check_finite(loss, "ft_sam", step)
        network.zero_grad()
        loss.backward()
