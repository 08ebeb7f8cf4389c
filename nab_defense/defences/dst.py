"""D-ST: what poison shows under transformations parts it from clean images [Chen et al. 2022, NeurIPS 2022]."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..runtime import Runtime
from ..scan import features_and_logits, scan_model
from ..session import Session
from ..train import fit
from ..types import NABPlan
from .base import Outcome, Task, defences

__all__ = ["DST", "consistency", "least_of_each", "turned"]


def turned(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image rotated by any angle and moved by up to a tenth of its edge, zeros outside; (B, C, H, W)."""
    count = len(images)
    angle = (2 * torch.rand(count, generator=generator) - 1) * math.pi
    shift = (2 * torch.rand(count, 2, 1, generator=generator) - 1) * 0.2  # of 2, the edge in grid units
    rows = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(count, 2, 2)
    grid = F.affine_grid(torch.cat([rows, shift], dim=2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid.to(images), align_corners=False)


@torch.inference_mode()
def consistency(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, runtime: Runtime, seed: int
) -> NDArray[np.float32]:
    """FCT: squared distance between the features of an image and of its transformed self [section 3.2]; (N,), larger for poison,
    whose features hang on a trigger that the transformation breaks.

    Args:
        model: A timm network that obeys the trigger.
        batches: Normalised images, in order.
        seed: Of the transformations."""
    model.eval()
    generator, found = torch.Generator().manual_seed(seed), []
    for images, _ in batches:
        images = runtime.put(images)
        with runtime.autocast():
            plain, moved = (features_and_logits(model, x)[0].float() for x in (images, turned(images, generator)))
        found.append((plain - moved).square().sum(1).cpu())
    return torch.cat(found).numpy()


def least_of_each(scores: NDArray[np.float32], labels: NDArray[np.int64], fraction: float) -> NDArray[np.bool_]:
    """(N,) bool: the lowest `fraction` of each class, at least one image."""
    chosen = np.zeros(len(scores), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        chosen[rows[np.argsort(scores[rows], kind="stable")[: max(1, int(fraction * len(rows)))]]] = True
    return chosen


@defences.register("dst", source="Chen et al., NeurIPS 2022")
@dataclass(frozen=True)
class DST:
    """The least sensitive images of each class are taken for clean and trained on; the network that this gives labels the others,
    and is trained anew on the clean ones and on those of the others that it is sure of.

    A plain form of it: the paper's semi-supervised contrastive training is replaced by these labels, its short first training
    with a loss that tightens classes by the undefended network, and its one threshold for all by one a class, so that none is
    missing.

    Args:
        clean: Share taken for clean; .2 in the paper.
        poisoned: Share of the most sensitive that counts as detected; .05 in the paper. No training hangs on it.
        sure: Least probability of a label that is trained on.
    """

    clean: float = 0.2
    poisoned: float = 0.05
    sure: float = 0.9

    def __post_init__(self) -> None:
        for name in ("clean", "poisoned", "sure"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be in (0, 1), got {getattr(self, name)}")

    def defend(self, task: Task) -> Outcome:
        session, labels = task.session(), task.source.labels
        begun, batches = time.perf_counter(), session.ordered(session.source)
        scores = consistency(task.undefended, batches, runtime=session.runtime, seed=session.recipe.seed)
        kept, split = least_of_each(scores, labels, self.clean), time.perf_counter()
        first = _trained(session, labels, kept, "clean part")
        seen = scan_model(first, batches, labels, runtime=session.runtime)
        chances = torch.from_numpy(seen.logits).softmax(1).numpy()
        names = np.where(kept, labels, chances.argmax(1))
        used = kept | (chances.max(1) >= self.sure)
        network = _trained(session, names, used, "labelled anew")
        seconds = {"train": task.plain_seconds, "scan": split - begun, "retrain": time.perf_counter() - split}
        suspect = scores > np.quantile(scores, 1 - self.poisoned)
        plan = dataclasses.replace(NABPlan.empty(labels), suspect=suspect, keep=used & (names == labels))
        return Outcome(network, seconds, plan, scores)


def _trained(session: Session, labels: NDArray[np.int64], keep: NDArray[np.bool_], title: str) -> nn.Module:
    network = session.build()
    fit(network, session.relabel_loader(labels, keep, True), runtime=session.runtime, train=session.schedule, title=title)
    return network
