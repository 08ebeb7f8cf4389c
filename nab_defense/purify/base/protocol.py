"""The registry of purifiers, what each of them does, and small helpers on networks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...clean import CleanSet, Pixels
from ...kept import Kept
from ...registry import Registry
from ...runtime import Runtime
from ...universal import Pool

__all__ = ["Candidates", "Notes", "Purifier", "check_finite", "divergence", "frozen", "norms", "purifiers", "train_norms"]

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

    def candidates(
        self, network: Pixels, clean: CleanSet, *, pool: Pool, runtime: Runtime, notes: Notes, kept: Kept
    ) -> Candidates:
        """Repaired networks, one after another, each with a name of its own that tells the knob ("round 3", "threshold 0.4").

        All are built like `network` is by then.

        Which one is shipped is not decided here: see run.purify. The network is measured and copied before the next is asked
        for, so that the method may go on changing the same one.

        Args:
            network: Takes pixels; a copy that may be changed in place.
            clean: Images to fit on.
            pool: Universal perturbations made on this network with these images, for methods that train against some, which may
                move them.
            runtime: Device, precision, seed.
            notes: To be filled, where there is something to tell.
            kept: What an interrupted call left, to go on from; those that it offered need not be offered again, but the last.

        Raises: ValueError: It cannot go on; what it offered until then stands."""
        ...


purifiers: Registry[Purifier] = Registry("purifier")


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
