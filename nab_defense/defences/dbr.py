"""D-BR: what poison shows under transformations parts it from clean images [Chen et al. 2022, NeurIPS 2022]."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..runtime import Runtime
from ..scan import features_and_logits
from ..session import Session
from ..train import TrainConfig, fit
from ..types import NABPlan
from .base import Outcome, Task, defences

__all__ = ["DBR", "consistency", "likeness", "turned", "unlearn_relearn"]

SHIFT = 0.2  # of the edge, at most
SPREAD = TrainConfig(epochs=10, batch_size=128, lr=0.01, sched="none")  # as the authors'


def turned(images: Tensor, black: Tensor, generator: torch.Generator) -> Tensor:
    """Each image rotated by any angle and moved by up to a fifth of its edge, black outside; (B, C, H, W).

    Args: black: What that is in the images, (C, 1, 1)."""
    count = len(images)
    angle = (2 * torch.rand(count, generator=generator) - 1) * math.pi
    shift = (2 * torch.rand(count, 2, 1, generator=generator) - 1) * 2 * SHIFT  # the edge is 2 in grid units
    rows = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(count, 2, 2)
    grid = F.affine_grid(torch.cat([rows, shift], dim=2), list(images.shape), align_corners=False)
    return F.grid_sample(images - black, grid.to(images), align_corners=False) + black


@torch.inference_mode()
def consistency(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], black: Tensor, *, runtime: Runtime, seed: int
) -> NDArray[np.float32]:
    """FCT: squared distance between the features of an image and of its transformed self [section 3.2]; (N,), larger for poison,
    whose features hang on a trigger that the transformation breaks.

    Args:
        model: A timm network that obeys the trigger.
        batches: Normalised images, in order.
        black: What that is in them, (C, 1, 1).
        seed: Of the transformations."""
    model.eval()
    generator, found, black = torch.Generator().manual_seed(seed), [], black.to(runtime.torch_device)
    for images, _ in batches:
        images = runtime.put(images)
        with runtime.autocast():
            plain, moved = (features_and_logits(model, x)[0].float() for x in (images, turned(images, black, generator)))
        found.append((plain - moved).square().sum(1).cpu())
    return torch.cat(found).numpy()


def likeness(features: Tensor, labels: Tensor) -> Tensor:
    """Mean cosine of the centers of different classes in a batch, counted as 0 with themselves; features that lower it tell a
    trigger from the content of its class [the authors' code].

    Args: features: (B, D). labels: (B,)."""
    centers = torch.stack([features[labels == label].mean(0) for label in labels.unique()])
    cosines = F.normalize(centers, dim=1) @ F.normalize(centers, dim=1).T
    return (cosines - torch.diag(cosines.diagonal())).mean()


def unlearn_relearn(classes: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a batch of clean images; of poisoned ones, whose labels are given as label + classes, its negative."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        sign = 1 - 2 * (labels >= classes).float()
        return (F.cross_entropy(logits, labels % classes, reduction="none") * sign).mean()

    return loss


class Features(nn.Module):
    """A network's features before its head, (B, D), in place of its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = features_and_logits(self.model, images)[0]
        return features


@dataclass(frozen=True, eq=False)
class OneAfterTheOther:
    """The batches of one loader, then those of another."""

    loaders: tuple[Any, Any]

    def __len__(self) -> int:
        return sum(map(len, self.loaders))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for loader in self.loaders:
            yield from loader


@defences.register("dbr", source="Chen et al., NeurIPS 2022")
@dataclass(frozen=True)
class DBR:
    """A network that is trained shortly, without augmentation, and then told to keep classes apart, tells images by how much a
    transformation changes their features. The undefended network climbs the loss on the most sensitive, and descends on the
    least.

    We leave the authors' code in three places. The first training takes as many epochs as the recipe's scan, not two, after which
    the small networks of the CPU grid do not know a trigger yet. Their batches are of 128 of 50,000 images; of fewer ours are
    smaller, down to 32, for as many steps, but for the second training; of fewer than 12,500 steps are fewer, too, of 1,300 a
    tenth. And the last network is taken, where theirs is the one that does best on the test set.

    Args:
        clean: Share of the least sensitive that is learned again; .2 in the paper.
        poisoned: Share of the most sensitive that is unlearned; .05 in the paper.
        epochs: Of unlearning and learning again; the authors' 20.
        lr: Of it; the authors' 1e-4.
    """

    clean: float = 0.2
    poisoned: float = 0.05
    epochs: int = 20
    lr: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("clean", "poisoned"):
            if not 0 < getattr(self, name) <= 0.5:
                raise ValueError(f"{name} must be in (0, .5], got {getattr(self, name)}")
        self._settings(32)  # refuse settings that cannot be used

    def _settings(self, batch: int) -> TrainConfig:
        return TrainConfig(epochs=self.epochs, batch_size=batch, lr=self.lr, sched="none")

    def defend(self, task: Task) -> Outcome:
        session, source, classes, small = task.session(), task.source, len(task.source.classes), _batch(len(task.source))
        begun = time.perf_counter()
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in session.normalization)
        batches, black, seed = session.ordered(source), -mean / std, session.recipe.seed
        scores = consistency(_sensitive(session), batches, black, runtime=session.runtime, seed=seed)
        order, split = np.argsort(scores, kind="stable"), time.perf_counter()
        least, most = (max(1, int(share * len(order))) for share in (self.clean, self.poisoned))
        clean, poison = order[:least], order[-most:]
        marked = source.replaced(labels=source.labels + classes, load=source.load, change="unlearn")
        parts = [
            session.loaders(part, session.recipe.train.augment, small, training=True)
            for part in (marked.subset(poison), source.subset(clean))
        ]
        network = copy.deepcopy(task.undefended)
        loader, loss = OneAfterTheOther((parts[0], parts[1])), unlearn_relearn(classes)
        fit(network, loader, runtime=session.runtime, train=self._settings(small), loss=loss, title="unlearn")
        seconds = {"train": task.plain_seconds, "scan": split - begun, "unlearn": time.perf_counter() - split}
        suspect = np.isin(np.arange(len(source)), poison)
        plan = dataclasses.replace(NABPlan.empty(source.labels), suspect=suspect, keep=~suspect)
        return Outcome(network, seconds, plan, scores)


def _batch(images: int) -> int:
    return min(128, max(32, 128 * images // 50_000))


def _sensitive(session: Session) -> nn.Module:
    """A network that knows the trigger, and tells it from the content of its class."""
    network, source, runtime = session.build(), session.source, session.runtime
    first = TrainConfig(epochs=session.recipe.scan.epochs, batch_size=_batch(len(source)), lr=SPREAD.lr, sched="none")
    few, many = (session.loaders(source, "none", how.batch_size, training=True) for how in (first, SPREAD))
    fit(network, few, runtime=runtime, train=first, title="learn the trigger")
    fit(Features(network), many, runtime=runtime, train=SPREAD, loss=likeness, title="keep classes apart")
    return network
