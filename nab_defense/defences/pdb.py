"""PDB: a backdoor of the defender's own that is stronger than the attacker's [Wei et al. 2024, arXiv:2405.16112]."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor, nn

from ..data import Source
from ..defended import DefendedModel
from ..pipeline import train
from ..schema import StampStage
from ..types import NABPlan
from .base import Outcome, Task, defences

__all__ = ["PDB", "MappedBack"]


class MappedBack(nn.Module):
    """Undoes the defender's own map of labels, y to y + 1.

    Args: model: Names class y + 1, the first after the last, where class y is meant."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of the meant classes."""
        logits: Tensor = self.model(images)
        return logits.roll(-1, dims=1)


@dataclass(frozen=True, eq=False)
class Joined:
    """Index -> image of a first set, then of a second one, which is gone through again and again."""

    first: Callable[[int], Image.Image]
    second: Callable[[int], Image.Image]
    counts: tuple[int, int]

    def __call__(self, index: int) -> Image.Image:
        beyond = index - self.counts[0]
        return self.first(index) if beyond < 0 else self.second(beyond % self.counts[1])


@defences.register("pdb", source="arXiv:2405.16112")
@dataclass(frozen=True)
class PDB:
    """Trusted images with the defender's patch and the label y + 1 are trained on beside everything else, and as they are, too;
    what is shipped paints the patch on every image and maps the answer back. Nothing is detected.

    We leave the authors' code in three places: its patch has twice the value of white, and ours is white, as bytes hold no more;
    it paints before images are cropped and flipped, and we paint last, as at inference; and it turns and darkens patched images,
    too. The trusted images are those of the task, while it reserves a tenth of the clean training set.

    Args:
        size: Edge of the patch in pixels at 32 px.
        repeats: How often each trusted image is seen an epoch.
    """

    size: int = 7
    repeats: int = 5

    def __post_init__(self) -> None:
        if self.size < 1 or self.repeats < 1:
            raise ValueError(f"size and repeats must be at least 1, got {self.size} and {self.repeats}")

    def defend(self, task: Task) -> Outcome:
        edge = task.recipe.data.size or min(224, task.source.edge())
        joined = with_reserved(task.source, task.clean, self.repeats)
        session = task.session(source=joined, stamp=StampStage(size=max(2, round(self.size * edge / 32)), value=1.0))
        reserved = np.arange(len(joined)) >= len(task.source) + len(task.clean)
        plan = dataclasses.replace(NABPlan.empty(joined.labels, joined.fingerprint), cover=reserved)
        begun, (mean, std) = time.perf_counter(), session.normalization
        network = train(session, plan, "proactive", kept=False)
        seconds = {"train": time.perf_counter() - begun}
        shipped = MappedBack(DefendedModel(network, session.stamp, mean=mean, std=std))
        return Outcome(shipped, seconds)  # no plan: what it changed are images beside the task's


def with_reserved(source: Source, clean: Source, repeats: int) -> Source:
    """The training images, the trusted ones as they are, and then these so many times with the label y + 1."""
    mapped = (clean.labels + 1) % len(source.classes)
    return source.replaced(
        labels=np.concatenate([source.labels, clean.labels, np.tile(mapped, repeats)]),
        ids=(*source.ids, *(f"reserved-{turn}-{name}" for turn in range(repeats + 1) for name in clean.ids)),
        load=Joined(source.load, clean.load, (len(source), len(clean))),
        change=f"reserved: {clean.fingerprint} {repeats}",
    )
