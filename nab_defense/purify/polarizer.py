"""NPD: one linear layer before the last block filters the trigger out [Zhu et al. 2023, arXiv:2306.16697]."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clean import CleanSet, Pixels, logits_of
from ..runtime import Runtime
from ..sites import Site, last_cut
from ..universal import boxed, climbed
from .base import Candidates, check_finite, due, flips, frozen, likely_classes, purifiers, turning

__all__ = ["Polarized", "Polarizer", "describe", "install"]

log = logging.getLogger(__name__)


class Polarized(nn.Module):
    """A module whose input goes through x + D x + b on the channel axis first; zero D and b change no bit."""

    def __init__(self, module: nn.Module, channels: int, axis: int) -> None:
        super().__init__()
        self.module = module
        self.axis = axis
        self.difference = nn.Parameter(torch.zeros(channels, channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def own(self) -> list[nn.Parameter]:
        """The polarizer's weights."""
        return [self.difference, self.bias]

    def forward(self, stream: Tensor) -> Any:
        if self.axis == -1:
            return self.module(stream + F.linear(stream, self.difference, self.bias))
        return self.module(stream + F.conv2d(stream, self.difference[..., None, None], self.bias))


def install(network: nn.Module, *, name: str, channels: int, axis: int) -> Polarized:
    """Put an identity polarizer before the module of this name, in place."""
    module = network.get_submodule(name)
    like = next(module.parameters())
    polarized = Polarized(module, channels, axis).to(like.device, like.dtype)
    network.set_submodule(name, polarized)
    return polarized.train(module.training)


def describe(network: nn.Module) -> dict[str, Any] | None:
    """What `install` must be told to rebuild the polarizer that this network carries; None where it has none."""
    for name, module in network.named_modules():
        if isinstance(module, Polarized):
            return asdict(Site(name, len(module.bias), module.axis))
    return None


@purifiers.register("polarizer", source="arXiv:2306.16697")
@dataclass(frozen=True)
class Polarizer:
    """Trains only the polarizer, on clean images and on images that a perturbation pushes toward a wrong class.

    The whole network stays as it is. The layer starts as the identity and sees the whole stream: at the published place the skip
    connection of a residual block leads the trigger around it. The paper attacks each image by itself, toward its runner-up
    class; a trigger is one change that turns all images to its class, and so is the attack here: one perturbation a class, which
    climbs along while the layer learns. A class is drawn the more often the more easily a small change turned images to it,
    since hardening a frozen network against every class costs more accuracy than one linear layer can win back.

    Args:
        steps: Updates.
        rounds: Candidates, at equal distances in the second half, the last at the end.
        batch_size: Images a step, as many again are attacked.
        lr: Of Adam on the layer, falling to zero along a cosine.
        radius: L2 norm of the perturbations at 32 px.
        pace: Of the radius, a step of a perturbation.
        sharpness: A class is drawn in proportion to this power of the share of images that a third of the radius turns.
        boosted, wrong, target: Weights, beside 1 on the clean images, of the cross-entropy on attacked ones and of two losses
            that take probability from the likeliest wrong class and from the attack's (paper: .4 each).
        augment: Random crops and flips.
    """

    labelled: ClassVar[bool] = True
    least: ClassVar[int] = 20

    steps: int = 240
    rounds: int = 3
    batch_size: int = 64
    lr: float = 1e-3
    radius: float = 3.0
    pace: float = 0.15
    sharpness: float = 4.0
    boosted: float = 0.4
    wrong: float = 0.4
    target: float = 0.4
    augment: bool = True

    def check(self, network: Pixels, images: Tensor) -> None:
        _site(network, images)

    def candidates(self, network: Pixels, clean: CleanSet, *, runtime: Runtime) -> Candidates:
        assert clean.labels is not None
        radius = self.radius * clean.scale
        frozen(network)
        classes, changes, ease = self._attacks(network, clean, runtime)
        batches = clean.endless(self.batch_size, runtime=runtime, seed=runtime.seed, augment=self.augment)
        layer = install(network.model, **asdict(_site(network, next(batches)[0][:2])))
        optimizer = torch.optim.Adam(layer.own(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        generator = torch.Generator().manual_seed(runtime.seed)
        for step in range(1, self.steps + 1):
            images, rows = next(batches)
            truth = clean.labels[rows].to(images.device)
            drawn = torch.multinomial(ease, len(images), replacement=True, generator=generator)
            changes.requires_grad_(True)
            plain, pushed = network(torch.cat([images, boxed(images + changes[drawn])])).chunk(2)
            loss = F.cross_entropy(plain, truth) + self._hardened(pushed, truth, classes[drawn].to(truth.device))
            check_finite(loss, "polarizer", step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            assert changes.grad is not None
            changes = climbed(changes, changes.grad, step=self.pace * radius, radius=radius)
            if due(step, self.steps, self.rounds, late=True):
                yield f"step {step}", network

    def _attacks(self, network: Pixels, clean: CleanSet, runtime: Runtime) -> tuple[Tensor, Tensor, Tensor]:
        """k classes to be attacked (k,), a first perturbation for each (k, C, H, W), and how often to use it (k,)."""
        third = self.radius / 3
        classes = likely_classes(network, clean, radius=third, runtime=runtime)
        plain = logits_of(network, clean, runtime).argmax(1)
        changes = [turning(network, clean, wanted, radius=third, runtime=runtime) for wanted in classes]
        rates = [flips(network, clean, plain, change, k, runtime) for change, k in zip(changes, classes, strict=True)]
        told = ", ".join(f"{k}: {rate:.2f}" for k, rate in zip(classes, rates, strict=True))
        log.info("polarizer: a small change turns to class: %s", told)
        return torch.tensor(classes), torch.stack(changes), torch.tensor(rates).clamp_min(0.01) ** self.sharpness

    def _hardened(self, pushed: Tensor, truth: Tensor, goal: Tensor) -> Tensor:
        """The losses on attacked images; what is high for the layer is what the perturbations climb to."""
        rival = _without(pushed.detach(), truth).argmax(1)
        loss = self.boosted * F.cross_entropy(pushed, truth) + self.wrong * _away(pushed, rival).mean()
        return loss + self.target * (_away(pushed, goal) * (goal != truth)).mean()


def _site(network: Pixels, images: Tensor) -> Site:
    return last_cut(network.model, (images - network.mean) / network.std)


def _without(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits, those of the labels at minus infinity."""
    return logits.scatter(1, labels[:, None], -torch.inf)


def _away(logits: Tensor, labels: Tensor) -> Tensor:
    """-log(1 - p_label) of each image, from the logits of the others."""
    return logits.logsumexp(1) - _without(logits, labels).logsumexp(1)
