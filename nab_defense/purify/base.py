"""What every purifier shares: the registry, the protocol, and small helpers on networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from .. import ranks
from ..changes import Universal
from ..clean import CleanSet, Pixels, mixed
from ..registry import Registry
from ..runtime import Runtime
from ..universal import Pool

__all__ = [
    "Attacked",
    "Candidates",
    "FineTuning",
    "Hardening",
    "Notes",
    "Purifier",
    "check_finite",
    "divergence",
    "due",
    "fine_tuned",
    "frozen",
    "hardened",
    "norms",
    "purifiers",
    "stepped",
    "train_norms",
]

MIXED = 0.5  # of the images of a batch without a perturbation
LEAST_STRENGTH, LEAST_SHARE = 0.05, 0.25  # of the radius, and of the part of a batch that is attacked, kept to the end

Candidates = Iterator[tuple[str, nn.Module]]
Network = TypeVar("Network", bound=nn.Module)


@dataclass(eq=False)
class Notes:
    """What a method learns about the backdoor, beside its candidates.

    Args:
        evidence: By name, JSON-able.
        unlearned: A network that has forgotten the clean images, takes pixels, and may still know the backdoor.
    """

    evidence: dict[str, Any] = field(default_factory=dict)
    unlearned: nn.Module | None = None


class Purifier(Protocol):
    """Repairs a network that may hold a backdoor.

    Attributes:
        labelled: It needs the labels of the clean images.
        least: Fewest images to fit on.
    """

    labelled: ClassVar[bool]
    least: ClassVar[int]

    def check(self, network: Pixels, images: Tensor) -> None:
        """Refuse a network that the method cannot serve, before anything is trained.

        Args: images: (2, C, H, W) pixels in [0, 1] to run it on.

        Raises: ValueError: Says what is missing."""
        ...

    def candidates(self, network: Pixels, clean: CleanSet, *, pool: Pool, runtime: Runtime, notes: Notes) -> Candidates:
        """Repaired networks, one after another, each with a name that tells the knob ("round 3", "threshold 0.4").

        Which one is shipped is not decided here: see run.purify. The network is measured and copied before the next is asked
        for, so that the method may go on changing the same one.

        Args:
            network: Takes pixels; a copy that may be changed in place.
            clean: Images to fit on.
            pool: Universal perturbations made on this network with these images, for methods that train against some, which may
                move them.
            runtime: Device, precision, seed.
            notes: To be filled, where there is something to tell.

        Raises: ValueError: It cannot go on; what it offered until then stands."""
        ...


purifiers: Registry[Purifier] = Registry("purifier")


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
) -> Candidates:
    """Training of all weights by SGD, whose rate falls to zero along a cosine; batch statistics and dropout included.

    Args: slope: (images, labels, step) -> sets the gradients of all weights."""
    assert clean.labels is not None
    network.requires_grad_(True)
    optimizer = torch.optim.SGD(network.parameters(), how.lr, how.momentum, weight_decay=how.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.steps)
    batches = clean.endless(how.batch_size, runtime=runtime, seed=runtime.seed, augment=how.augment)
    for step in stepped(how.steps, type(how).__name__):
        images, rows = next(batches)
        network.train()
        slope(images, clean.labels[rows].to(images.device), step)
        optimizer.step()
        schedule.step()
        if due(step, how.steps, how.rounds):
            yield f"step {step}", network


def stepped(steps: int, title: str) -> Iterable[int]:
    """1 to `steps`, with a progress bar where someone watches."""
    disable = None if ranks.leads() else True
    return tqdm(range(1, steps + 1), desc=title, unit="step", leave=False, disable=disable)


def due(step: int, steps: int, rounds: int, *, late: bool = False) -> bool:
    """Whether one of so many candidates is due after this step: at equal distances up to the end, `late` from half-way on."""
    skipped = rounds * late
    parts = rounds + skipped
    return step * parts // steps > max(skipped, (step - 1) * parts // steps)


def frozen(network: Network) -> Network:
    """Switch off the gradients of all weights and put the network in eval mode, in place."""
    network.requires_grad_(False)
    return network.eval()


def norms(network: nn.Module) -> dict[str, _BatchNorm]:
    """The layers that normalise by batch statistics, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, _BatchNorm)}


def train_norms(network: nn.Module) -> None:
    """Eval mode, without dropout and stochastic depth, but with normalisations that follow the batches."""
    network.eval()
    for norm in norms(network).values():
        norm.train()


def check_finite(value: Tensor, method: str, step: int) -> None:
    """Raise ValueError where a loss is not finite."""
    if not torch.isfinite(value):
        raise ValueError(f"{method}: the loss is {value.item()} in step {step}; lower lr, or give other clean images")


def divergence(logits: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean Kullback-Leibler divergence from the softened answers, times the squared temperature; both (B, K)."""
    own, theirs = (logits / temperature).log_softmax(1), (wanted / temperature).log_softmax(1)
    return F.kl_div(own, theirs, reduction="batchmean", log_target=True) * temperature**2


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
) -> Candidates:
    """Training against universal perturbations, with a rate that falls to zero along a cosine.

    Args: slope: Sets the gradients that the optimizer follows, from a batch; they come in cleared."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.steps)
    for batch in _attacked(how, network, teacher, clean, pool, runtime):
        optimizer.zero_grad()
        slope(batch)
        optimizer.step()
        schedule.step()
        if due(batch.step, how.steps, how.rounds, late=True):
            yield f"step {batch.step}", network


def _attacked(
    how: Hardening, network: Pixels, teacher: Pixels, clean: CleanSet, pool: Pool, runtime: Runtime
) -> Iterator[Attacked]:
    """The batches of a training against universal perturbations, which climb on the network as it is at that step.

    They are made on the teacher, the original network. The radius and the part of a batch that is attacked fall along a cosine,
    with the learning rates: the end belongs to accuracy. Of the others a part are mixtures, on which the original's answers are
    held: a few images then stand for many."""
    generator = torch.Generator().manual_seed(runtime.seed)
    batches = clean.endless(how.batch_size, runtime=runtime, seed=runtime.seed, augment=how.augment)
    for step in stepped(how.steps, type(how).__name__):
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
