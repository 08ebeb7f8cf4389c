"""Narcissus: a clean-label trigger that looks more like the target class to a network than the class itself does
[Zeng et al. 2022, arXiv:2204.05255]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..attacker import Classifier, draws, fit_classifier, grown, to_unit
from .base import Images, Learned, Lesson, attacks, check_number, learned_shape, to_uint8

__all__ = ["Narcissus"]


def inward_noise(
    network: Classifier, images: Tensor, target: int, *, eps: float, epochs: int, generator: torch.Generator
) -> Tensor:
    """argmin over ||d|| <= eps (L-inf) of the mean loss of the target for images + d (eq. 2), (1, C, E, E), by Adam.

    Args:
        network: Frozen, knows the classes.
        images: (N, C, E, E) in [0, 1], all of the target class."""
    device = next(network.parameters()).device
    noise = torch.zeros(1, *images.shape[1:], device=device, requires_grad=True)
    optimizer = torch.optim.Adam([noise], lr=eps / 10)
    for chosen in draws(len(images), batch=64, epochs=epochs, generator=generator):
        moved = (images[chosen].to(device) + noise).clamp(0, 1)
        loss = F.cross_entropy(network(moved), torch.full((len(chosen),), target, device=device))
        (noise.grad,) = torch.autograd.grad(loss, noise)
        optimizer.step()
        with torch.no_grad():
            noise.clamp_(-eps, eps)
    return noise.detach().cpu()


@attacks.register("narcissus", source="arXiv:2204.05255")
@dataclass(frozen=True)
class Narcissus(Learned):
    """image + trigger in training, on images of the target class alone; image + magnify * trigger at test time, clipped.

    The paper's surrogate knows other data and is tuned on the target class; ours is a small network learned from the data to
    poison. Images above 32 px get the trigger enlarged.

    Args:
        eps: Largest value of the trigger, in grey levels, in [1, 128].
        magnify: Factor of the trigger at test time, in [1, 10].
        epochs: Training of the surrogate, in [1, 1000].
        rounds: Passes over the target class that optimise the trigger, in [1, 1000].
    """

    clean_label: ClassVar[bool] = True

    eps: float = 16.0
    magnify: float = 3.0
    epochs: int = 8
    rounds: int = 20

    def __post_init__(self) -> None:
        check_number("eps", self.eps, 1, 128)
        check_number("magnify", self.magnify, 1, 10)
        check_number("epochs", self.epochs, 1, 1000, whole=True)
        check_number("rounds", self.rounds, 1, 1000, whole=True)

    def learn(self, lesson: Lesson) -> dict[str, Tensor]:
        images, labels = to_unit(lesson.images), torch.from_numpy(lesson.labels)
        known = {"classes": lesson.num_classes, "seed": lesson.seed, "runtime": lesson.runtime}
        network = fit_classifier(images, labels, epochs=self.epochs, **known)  # type: ignore[arg-type]
        target = lesson.target
        own = images[labels == target]
        if target is None or not len(own):
            raise ValueError(f"narcissus learns from images of the target class, and found none of class {target}")
        generator = torch.Generator().manual_seed(lesson.seed)
        return {"noise": inward_noise(network, own, target, eps=self.eps / 255, epochs=self.rounds, generator=generator)}

    def trigger(self, images: Images) -> NDArray[Any]:
        """(H, W, C) in grey levels, for images of this form."""
        noise = self.learned()["noise"]
        _, height, width, _ = learned_shape(images, noise.shape[1])
        pixels: NDArray[Any] = 255 * grown(noise, height, width)[0].permute(1, 2, 0).numpy()
        return pixels

    def apply(self, images: Images, seed: int) -> Images:
        return to_uint8(images + self.trigger(images))

    def at_test(self, images: Images, seed: int) -> Images:
        return to_uint8(images + self.magnify * self.trigger(images))
