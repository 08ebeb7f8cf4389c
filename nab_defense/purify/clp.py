"""CLP: prune the channels that amplify most, without any data [Zheng et al. 2022, arXiv:2208.03111]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..clean import CleanSet, Pixels
from ..kept import Kept
from ..runtime import Runtime
from ..universal import Pool
from .base import Candidates, Notes, in_range, norms, purifiers

__all__ = ["CLP", "amplification", "normalised_convolutions"]

LOOSEST = 5.0  # deviations above its layer's mean: what a first candidate cuts


@torch.no_grad()
def normalised_convolutions(network: nn.Module, images: Tensor) -> list[tuple[_ConvNd, _BatchNorm]]:
    """Pairs of a convolution and the batch normalisation with weights that takes its output, as found by running it.

    The output is followed as the tensor it is: a normalisation of a sum of two branches, or after an activation, has no pair.

    Args: images: (B, C, H, W) of what the network takes."""
    made: list[tuple[_ConvNd, Tensor, int]] = []  # held, so that no other tensor can take their place in memory
    pairs: list[tuple[_ConvNd, _BatchNorm]] = []

    def convolved(layer: _ConvNd, _: Any, out: Tensor) -> None:
        made.append((layer, out, out._version))

    def normalises(layer: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        if layer.weight is not None and layer.running_var is not None:
            pairs.extend((conv, layer) for conv, out, version in made if out is inputs[0] and out._version == version)

    hooks = [layer.register_forward_pre_hook(normalises) for layer in norms(network).values()]
    for layer in network.modules():
        if isinstance(layer, _ConvNd) and not isinstance(layer, _ConvTransposeNd):
            hooks.append(layer.register_forward_hook(convolved))
    try:
        network.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
    return pairs


@torch.no_grad()
def amplification(conv: _ConvNd, norm: _BatchNorm) -> Tensor:
    """Upper bound of each channel's Lipschitz constant: largest singular value of its kernel, times |scale| / deviation.

    Returns: (C,), >= 0."""
    assert norm.running_var is not None
    largest = torch.linalg.matrix_norm(conv.weight.float().flatten(2), ord=2)
    return largest * norm.weight.abs() / (norm.running_var + norm.eps).sqrt()


@purifiers.register("clp", source="arXiv:2208.03111")
@dataclass(frozen=True)
class CLP:
    """Sets to zero, scale and shift, the channels that amplify more than mean + u deviations of their layer.

    It reads weights alone; the clean images only select. Where convolutions are not followed by batch normalisation it has
    nothing to prune and refuses.

    Args:
        strictest: The smallest u, in [0, 5].
        rounds: Candidates, from u = 5 down to `strictest`, in equal steps; 1: `strictest` alone.
    """

    labelled: ClassVar[bool] = False
    least: ClassVar[int] = 1

    strictest: float = 2.0
    rounds: int = 7

    def __post_init__(self) -> None:
        in_range(self, "rounds", low=1)
        in_range(self, "strictest", low=0, high=LOOSEST, ends="[]")

    def check(self, network: Pixels, images: Tensor) -> None:
        if not normalised_convolutions(network, images):
            raise ValueError("clp prunes convolutions followed by batch normalisation; this network has none")

    def candidates(
        self, network: Pixels, clean: CleanSet, *, pool: Pool, runtime: Runtime, notes: Notes, kept: Kept
    ) -> Candidates:
        images, _ = next(clean.batches(2, runtime=runtime))
        pairs = [(norm, amplification(conv, norm)) for conv, norm in normalised_convolutions(network, images)]
        for u in torch.linspace(self.strictest, LOOSEST, self.rounds).flip(0).tolist():
            with torch.no_grad():
                for norm, gains in pairs:
                    loud = gains > gains.mean() + u * gains.std()
                    norm.weight[loud] = 0
                    norm.bias[loud] = 0
            yield f"u {u:g}", network
