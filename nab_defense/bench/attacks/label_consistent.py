"""Label-consistent: images of the target class made hard to tell, so that a patch is learned instead
[Turner et al. 2019, arXiv:1912.02771]."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..attacker import Classifier, exact, fit_classifier, from_unit, grown, restored, shrunk, state, to_unit
from .base import Images, Learned, Lesson, attacks, check_number, image_shape, learned_shape

__all__ = ["LabelConsistent"]

PATCH = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=np.uint8) * 255  # the bottom right one; mirrored in the other corners


def adversarial(network: Classifier, images: Tensor, label: int, *, eps: float, steps: int) -> Tensor:
    """Images (N, C, E, E) in [0, 1] after `steps` steps of 2.5 eps / steps up the sign of the slope of the loss of their true
    label, within eps of each pixel. It starts at the image, and so needs no randomness."""
    labels = torch.full((len(images),), label)
    moved = images.clone()
    for _ in range(steps):
        moved.requires_grad_(True)
        (slope,) = torch.autograd.grad(F.cross_entropy(network(moved), labels, reduction="sum"), moved)
        moved = moved.detach() + 2.5 * eps / steps * slope.sign()
        moved = torch.minimum(torch.maximum(moved, images - eps), images + eps).clamp(0, 1)
    return moved.detach()


@attacks.register("label_consistent", source="arXiv:1912.02771")
@dataclass(frozen=True)
class LabelConsistent(Learned):
    """Training: argmax of the loss of the true label over ||d|| <= eps (L-inf), for a clean network, then a 3x3 patch in all four
    corners, labels untouched. Test: the patch alone.

    The paper's network is trained adversarially; ours is a small plain one, learned from the data. Images above 32 px are
    perturbed at 32 px and the perturbation is enlarged.

    Args:
        eps: Largest change of a pixel outside the patches, in grey levels, in [1, 128]; the paper's are 8, 16 and 32.
        steps: Steps of the perturbation, in [1, 200]; the paper takes 100.
        size: Edge of a patch in pixels, at least 2; None scales with the image, 3 px at 32.
        epochs: Training of the clean network, in [1, 1000].
    """

    clean_label: ClassVar[bool] = True

    eps: float = 16.0
    steps: int = 10
    size: int | None = None
    epochs: int = 8

    def __post_init__(self) -> None:
        check_number("eps", self.eps, 1, 128)
        check_number("steps", self.steps, 1, 200, whole=True)
        check_number("epochs", self.epochs, 1, 1000, whole=True)
        if self.size is not None:
            check_number("size", self.size, 2, 4096, whole=True)  # one pixel of the patch is black

    def learn(self, lesson: Lesson) -> dict[str, Tensor]:
        """The clean network, the target, and the size it works at."""
        images, labels = to_unit(lesson.images), torch.from_numpy(lesson.labels)
        known = {"classes": lesson.num_classes, "seed": lesson.seed, "runtime": lesson.runtime}
        network = fit_classifier(images, labels, epochs=self.epochs, **known)  # type: ignore[arg-type]
        return {**state(network, "network."), "target": torch.tensor(lesson.target), "edge": torch.tensor(images.shape[2])}

    @cached_property
    def network(self) -> Classifier:
        weights = self.learned("network.")
        channels, classes = weights["body.0.weight"].shape[1], len(weights["head.bias"])
        network = restored(partial(Classifier, channels, classes), weights)
        assert isinstance(network, Classifier)
        return network

    def apply(self, images: Images, seed: int) -> Images:
        learned = self.learned()
        _, height, width, _ = learned_shape(images, learned["network.body.0.weight"].shape[1])
        edge, target = int(learned["edge"]), int(learned["target"])
        with exact(slopes=True):
            large = to_unit(images)
            small = shrunk(large, edge)
            change = adversarial(self.network, small, target, eps=self.eps / 255, steps=self.steps) - small
            perturbed = from_unit(large + grown(change, height, width))
        return self.at_test(perturbed, seed)

    def at_test(self, images: Images, seed: int) -> Images:
        _, height, width, _ = image_shape(images)
        edge = self.size or max(2, round(3 * min(height, width) / 32))
        if 2 * edge > min(height, width):
            raise ValueError(f"four {edge} px patches do not fit on a {height}x{width} image")
        cell = np.arange(edge) * len(PATCH) // edge
        patch = PATCH[cell[:, None], cell[None, :], None]
        painted = images.copy()
        painted[:, -edge:, -edge:], painted[:, -edge:, :edge] = patch, patch[:, ::-1]
        painted[:, :edge, -edge:], painted[:, :edge, :edge] = patch[::-1], patch[::-1, ::-1]
        return painted
