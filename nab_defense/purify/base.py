"""What every purifier shares: the registry, the protocol, and small helpers on networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..clean import CleanSet, Pixels, logits_of
from ..registry import Registry
from ..runtime import Runtime
from ..universal import ascended, boxed

__all__ = [
    "Candidates",
    "FineTuning",
    "Purifier",
    "check_finite",
    "due",
    "fine_tuned",
    "flips",
    "frozen",
    "likely_classes",
    "norms",
    "purifiers",
    "train_norms",
    "turning",
]

PROBE_STEPS, PROBE_BATCH, PROBE_IMAGES, PROBE_CLASSES = 10, 48, 250, 10

Candidates = Iterator[tuple[str, nn.Module]]
Network = TypeVar("Network", bound=nn.Module)


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

    def candidates(self, network: Pixels, clean: CleanSet, *, runtime: Runtime) -> Candidates:
        """Repaired networks, one after another, each with a name that tells the knob ("round 3", "threshold 0.4").

        Which one is shipped is not decided here: see run.purify. The network is measured and copied before the next is asked
        for, so that the method may go on changing the same one.

        Args:
            network: Takes pixels; a copy that may be changed in place.
            clean: Images to fit on.
            runtime: Device, precision, seed."""
        ...


purifiers: Registry[Purifier] = Registry("purifier")


class FineTuning(Protocol):
    """The settings that methods which train all weights on clean images share; see FineTune."""

    @property
    def steps(self) -> int: ...
    @property
    def rounds(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def augment(self) -> bool: ...


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
    for step in range(1, how.steps + 1):
        images, rows = next(batches)
        network.train()
        slope(images, clean.labels[rows].to(images.device), step)
        optimizer.step()
        schedule.step()
        if due(step, how.steps, how.rounds):
            yield f"step {step}", network


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


def turning(network: nn.Module, clean: CleanSet, wanted: int | None, *, radius: float, runtime: Runtime) -> Tensor:
    """One change of the pixels (C, H, W) that turns as many images as it can: to a class, or away from what they are given.

    Args: radius: Its largest L2 norm at 32 px."""
    length, batches = radius * clean.scale, clean.endless(PROBE_BATCH, runtime=runtime, seed=runtime.seed, augment=False)
    network.eval()
    change = torch.zeros_like(next(batches)[0][0])
    for step in range(PROBE_STEPS):
        images, _ = next(batches)
        goal = torch.full((len(images),), wanted or 0, device=images.device)
        if wanted is None:
            with torch.no_grad():
                goal = network(images).argmax(1)

        def value(change: Tensor, images: Tensor = images, goal: Tensor = goal) -> Tensor:
            with runtime.autocast():
                loss = F.cross_entropy(network(boxed(images + change)).float(), goal)
            return loss if wanted is None else -loss

        stride = length * (2 if step < PROBE_STEPS // 2 else 1) / PROBE_STEPS
        change = ascended(change, value, step=stride, radius=length)
    return change


def likely_classes(network: nn.Module, clean: CleanSet, *, radius: float, runtime: Runtime) -> list[int]:
    """All classes; where there are more than PROBE_CLASSES, those that a change which merely spoils predictions leads to."""
    count = logits_of(network, clean.take(torch.arange(1)), runtime).shape[1]
    if count <= PROBE_CLASSES:
        return list(range(count))
    spoiled = logits_of(network, clean, runtime, turning(network, clean, None, radius=radius, runtime=runtime))
    return [int(k) for k in spoiled.softmax(1).mean(0).topk(PROBE_CLASSES).indices]


def flips(network: nn.Module, clean: CleanSet, plain: Tensor, change: Tensor, wanted: int, runtime: Runtime) -> float:
    """Share of images that the change turns to a class, among those not given it anyway.

    Args: plain: (N,) what the network says without the change."""
    others = (plain != wanted).nonzero().squeeze(1)[:PROBE_IMAGES]
    if not len(others):
        return 1.0  # a network that names everything alike is turned already
    turned = logits_of(network, clean.take(others), runtime, change).argmax(1)
    return float((turned == wanted).float().mean())
