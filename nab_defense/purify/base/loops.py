"""Loops of steps that offer candidates on their way, and that can be gone on with after a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from ... import ranks
from ...clean import CleanSet, Pixels
from ...kept import Kept
from ...runtime import Runtime, fixed_seed
from .protocol import Candidates

__all__ = ["FineTuning", "Stepping", "due", "fine_tuned", "keep", "stepped", "taken_up"]

TRAINING, EVERY = "training", 20.0  # what is kept of a loop, and how often, in seconds


class Stepping(Protocol):
    """The settings that all methods which train step by step share."""

    @property
    def steps(self) -> int: ...
    @property
    def rounds(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def augment(self) -> bool: ...


class FineTuning(Stepping, Protocol):
    """The settings that methods which train all weights on clean images share; see FineTune."""

    @property
    def lr(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


def fine_tuned(
    how: FineTuning,
    network: Pixels,
    clean: CleanSet,
    slope: Callable[[Tensor, Tensor, int], None],
    *,
    runtime: Runtime,
    kept: Kept,
) -> Candidates:
    """Training of all weights by SGD, whose rate falls to zero along a cosine; batch statistics and dropout included.

    Args: slope: (images, labels, step) -> sets the gradients of all weights."""
    assert clean.labels is not None
    network.requires_grad_(True)
    optimizer = torch.optim.SGD(network.parameters(), how.lr, how.momentum, weight_decay=how.weight_decay)
    parts = {"network": network, "optimizer": optimizer}
    parts["schedule"] = schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.steps)
    done = taken_up(kept, **parts)
    batches = clean.endless(how.batch_size, runtime=runtime, seed=runtime.seed, augment=how.augment)
    for _ in range(done):
        next(batches)
    for step in stepped(how.steps, type(how).__name__, done):
        images, rows = next(batches)
        fixed_seed(runtime.seed, step)  # of dropout, whenever the step is taken
        network.train()
        slope(images, clean.labels[rows].to(images.device), step)
        optimizer.step()
        schedule.step()
        if due(step, how.steps, how.rounds):
            yield f"step {step}", network
        keep(kept, step, how.steps, **parts)


def taken_up(kept: Kept, **parts: Any) -> int:
    """Put these parts in the state that an interrupted loop left them in. Returns: the steps it had taken."""
    saved = kept.read(TRAINING)
    if saved is None:
        return 0
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return int(saved["step"])


def keep(kept: Kept, step: int, steps: int, **parts: Any) -> None:
    """Keep the state of these parts from time to time, but not after the last step, which then is taken again and offers the last
    candidate."""
    if step < steps:
        kept.write(TRAINING, lambda: {"step": step, **{name: part.state_dict() for name, part in parts.items()}}, every=EVERY)


def stepped(steps: int, title: str, done: int = 0) -> Iterable[int]:
    """done + 1 to `steps`, with a progress bar where someone watches."""
    return ranks.watched(range(done + 1, steps + 1), title, steps, done=done, unit="step")


def due(step: int, steps: int, rounds: int, *, late: bool = False) -> bool:
    """Whether one of so many candidates is due after this step: at equal distances up to the end, `late` from half-way on."""
    skipped = rounds * late
    parts = rounds + skipped
    return step * parts // steps > max(skipped, (step - 1) * parts // steps)
