"""BCU: re-initialise a share of the weights, win the skill back without labels [Pang et al. 2023, arXiv:2211.12044]."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..clean import CleanSet, Pixels
from ..kept import Kept
from ..runtime import Runtime
from ..universal import Pool
from .base import (
    Attacked,
    Candidates,
    Notes,
    check_finite,
    divergence,
    frozen,
    hardened,
    in_range,
    purifiers,
    recentred,
    train_norms,
)

__all__ = ["Distill", "layers_by_depth", "reinitialise", "shares"]


CLIP = 2.0  # of the gradient norm: the first perturbed images are answered with certainty, and wrongly


@torch.no_grad()
def layers_by_depth(network: nn.Module, images: Tensor) -> list[_ConvNd | nn.Linear]:
    """Convolutions and linear layers in the order in which they first run.

    Only their weights are re-initialised: norms, biases, position embeddings, tokens and layer scales are none of these.

    Args: images: (B, C, H, W) of what the network takes."""
    met: dict[_ConvNd | nn.Linear, None] = {}
    layers = [layer for layer in network.modules() if isinstance(layer, _ConvNd | nn.Linear) and "weight" in layer._parameters]
    hooks = [layer.register_forward_pre_hook(lambda layer, _: met.update({layer: None})) for layer in layers]
    try:
        network.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
    return list(met)


def shares(count: int, first: float, last: float, head: float) -> list[float]:
    """What share of each layer's weights is re-initialised: from `first` to `last` by equal factors, then `head`.

    Args: count: Layers, >= 1; the last is the head."""
    depths = [place / max(1, count - 2) for place in range(count - 1)]
    body = [first ** (1 - depth) * last**depth for depth in depths]
    return [*body, head]


@torch.no_grad()
def reinitialise(weight: Tensor, share: float, generator: torch.Generator) -> None:
    """Each entry, with the chance `share`, becomes another entry of the same weight, drawn at random; in place.

    So the scale fits whatever the layer was initialised or trained to, where a default initialisation would not."""
    drawn = weight.flatten()[torch.randint(weight.numel(), weight.shape, generator=generator).to(weight.device)]
    weight.copy_(torch.where((torch.rand(weight.shape, generator=generator) < share).to(weight.device), drawn, weight))


@purifiers.register("distill", source="arXiv:2211.12044")
@dataclass(frozen=True)
class Distill:
    """A copy of the network loses some weights, more of them the deeper, and learns the original's answers to any images.

    The images need no labels and need not be of the classes. Re-initialising alone takes accuracy before it takes a backdoor,
    which is the strongest thing in the network; so, beyond the paper, part of each batch carries a universal perturbation, as
    in IBAU, and the copy is to answer as the original does without it. Normalisations follow the batches, from clean statistics
    on (see base.recentred).

    Args:
        steps: Optimizer steps.
        rounds: Candidates, at equal distances in the second half, the last at the end.
        batch_size: Images a step.
        lr, momentum, weight_decay: Of SGD, whose rate falls to zero along a cosine.
        temperature: Softens both answers.
        first, last, head: Shares of weights re-initialised in the first layer, the last before the head, and the head.
        fraction: Part of a batch that carries one, at first; 0: none.
        augment: Random crops and flips.
    """

    labelled: ClassVar[bool] = False
    least: ClassVar[int] = 100

    steps: int = 360
    rounds: int = 1
    batch_size: int = 64
    lr: float = 0.06
    momentum: float = 0.9
    weight_decay: float = 2e-4
    temperature: float = 1.0
    first: float = 0.002
    last: float = 0.01
    head: float = 0.007
    fraction: float = 0.45
    augment: bool = True

    def __post_init__(self) -> None:
        in_range(self, "steps", "rounds", "batch_size", low=1)
        in_range(self, "lr", "temperature", low=0, ends="()")
        in_range(self, "weight_decay", low=0)
        in_range(self, "momentum", "fraction", low=0, high=1)
        in_range(self, "first", "last", "head", low=0, high=1, ends="[]")

    def check(self, network: Pixels, images: Tensor) -> None:
        if not layers_by_depth(network, images):
            raise ValueError("distill re-initialises convolutions and linear layers; this network has none")

    def candidates(
        self, network: Pixels, clean: CleanSet, *, pool: Pool, runtime: Runtime, notes: Notes, kept: Kept
    ) -> Candidates:
        recentred(network, clean, runtime=runtime, augment=self.augment)
        teacher = frozen(copy.deepcopy(network))
        self._reinitialise(network, runtime.put(clean.images[:2].float() / 255), runtime.seed)
        network.requires_grad_(True)
        optimizer = torch.optim.SGD(network.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay)

        def slope(batch: Attacked) -> None:
            train_norms(network)
            with runtime.autocast():
                logits = network(batch.painted())
            batch.note(logits.detach())
            loss = divergence(logits, batch.wanted, self.temperature)
            check_finite(loss, "distill", batch.step)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)

        yield from hardened(self, network, teacher, clean, optimizer, slope, pool=pool, runtime=runtime, kept=kept)

    def _reinitialise(self, network: Pixels, images: Tensor, seed: int) -> None:
        layers = layers_by_depth(network, images)
        generator = torch.Generator().manual_seed(seed)
        for layer, share in zip(layers, shares(len(layers), self.first, self.last, self.head), strict=True):
            reinitialise(layer.weight, share, generator)
