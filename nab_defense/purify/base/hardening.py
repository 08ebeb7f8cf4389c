"""Training against universal perturbations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...changes import Universal
from ...clean import CleanSet, Pixels, mixed
from ...kept import Kept
from ...runtime import Runtime
from ...universal import Pool
from .loops import Stepping, due, keep, stepped, taken_up
from .protocol import Candidates, divergence

__all__ = ["Attacked", "Hardening", "hardened", "missed", "rate_for"]

MIXED = 0.5  # of the images of a batch without a perturbation
FEW = 256  # images to fit on: with fewer the rate falls in proportion, since fewer say less of what is to stay
LEAST_STRENGTH, LEAST_SHARE = 0.05, 0.25  # of the radius, and of the part of a batch that is attacked, kept to the end


class Hardening(Stepping, Protocol):
    """The settings that methods which train against universal perturbations share; see IBAU."""

    @property
    def fraction(self) -> float: ...


@dataclass(frozen=True, eq=False)
class Attacked:
    """A batch whose first part is to be turned to a class.

    Args:
        step: From 1.
        images: (B, C, H, W) pixels in [0, 1].
        rows: (B,) where they are in the clean set.
        wanted: (B, K) the original network's logits of them.
        count: How many of them carry the perturbation.
        alone: How many, those first, show one image, which has a label; the others are mixtures of two.
        one: The perturbation.
    """

    step: int
    images: Tensor
    rows: Tensor
    wanted: Tensor
    count: int
    alone: int
    one: Universal

    def painted(self, change: Tensor | None = None) -> Tensor:
        """The images, the first `count` with the perturbation, or with another change in its place."""
        return torch.cat([self.one.painted(self.images[: self.count], change), self.images[self.count :]])

    def others(self) -> Tensor:
        """(count,) bool: the perturbed ones that do not belong to the class anyway."""
        return self.wanted[: self.count].argmax(1) != self.one.wanted

    def note(self, logits: Tensor) -> None:
        """Remember how many were turned, which decides how often the perturbation is drawn; logits (B, K)."""
        others = self.others()
        if others.any():
            hit = float((logits[: self.count].argmax(1)[others] == self.one.wanted).float().mean())
            self.one.rate = (self.one.rate + hit) / 2


def rate_for(lr: float, clean: CleanSet) -> float:
    """The learning rate for so many images to fit on: less than `lr`, in proportion to their number, where they are few."""
    return lr * min(1.0, len(clean) / FEW)


def missed(
    network: Pixels, batch: Attacked, truths: Tensor, hold: float, runtime: Runtime, change: Tensor | None = None
) -> Tensor:
    """What is to be low: labels and, `hold` times, the original's answers missed, where a part carries the perturbation.

    Args:
        truths: (N,) labels of the clean set.
        change: In the perturbation's place."""
    with runtime.autocast():
        logits = network(batch.painted(change))
    batch.note(logits.detach())
    truth = truths[batch.rows[: batch.alone]].to(logits.device)
    return F.cross_entropy(logits[: batch.alone], truth) + hold * divergence(logits, batch.wanted)


def hardened(
    how: Hardening,
    network: Pixels,
    teacher: Pixels,
    clean: CleanSet,
    optimizer: torch.optim.Optimizer,
    slope: Callable[[Attacked], None],
    *,
    pool: Pool,
    runtime: Runtime,
    kept: Kept,
) -> Candidates:
    """Training against universal perturbations, with a rate that falls to zero along a cosine.

    Args: slope: Sets the gradients that the optimizer follows, from a batch; they come in cleared."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.steps)
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule, "pool": pool}
    done = taken_up(kept, **parts)
    for batch in _attacked(how, network, teacher, clean, pool, runtime, done):
        optimizer.zero_grad()
        slope(batch)
        optimizer.step()
        schedule.step()
        if due(batch.step, how.steps, how.rounds, late=True):
            yield f"step {batch.step}", network
        keep(kept, batch.step, how.steps, **parts)


def _attacked(
    how: Hardening, network: Pixels, teacher: Pixels, clean: CleanSet, pool: Pool, runtime: Runtime, done: int = 0
) -> Iterator[Attacked]:
    """The batches after the first `done`, and perturbations, which climb on the network as it is at that step.

    They are made on the teacher, the original network. The radius and the part of a batch that is attacked fall along a cosine,
    with the learning rates: the end belongs to accuracy. Of the others a part are mixtures, on which the original's answers are
    held: a few images then stand for many."""
    generator = torch.Generator().manual_seed(runtime.seed)
    batches = clean.endless(how.batch_size, runtime=runtime, seed=runtime.seed, augment=how.augment)
    for _ in range(done):
        mixed(next(batches)[0], generator)  # for what it draws
    for step in stepped(how.steps, type(how).__name__, done):
        images, rows = next(batches)
        left = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / how.steps)
        count = max(1 if how.fraction else 0, round(how.fraction * max(LEAST_SHARE, left) * len(images)))
        alone = len(images) - round(MIXED * (len(images) - count))
        images = torch.cat([images[:alone], mixed(images, generator)[alone:]])
        with torch.no_grad(), runtime.autocast():
            wanted = teacher(images)
        batch = Attacked(step, images, rows, wanted, count, alone, pool.draw())
        part = images[: batch.count][batch.others()]
        if len(part):
            strength = max(LEAST_STRENGTH, left)
            batch.one.follow(network.eval(), part, strength=strength, runtime=runtime)
        yield batch
