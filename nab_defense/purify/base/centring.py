"""Normalisations that know the clean images."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...clean import CleanSet, Pixels
from ...runtime import Runtime
from .protocol import norms

__all__ = ["recentred"]

PASS_BATCH, PASS_IMAGES = 64, 768  # seen to measure, augmented as in training


@torch.no_grad()
def recentred(network: Pixels, clean: CleanSet, *, runtime: Runtime, augment: bool) -> Pixels:
    """Give batch normalisations the statistics of clean images, and weights that make the network compute what it did; in place.

    The statistics of a published model can be far from those of clean batches: two that were published with I-BAU fall from
    .78 to .60 and .63 where their normalisations are measured anew on 80 clean training images. Training whose normalisations
    follow the batches starts from that, and a few images do not win it back. With y = w (x - m) / s + b and clean statistics
    n, t, the weights become w t / s and b + w (n - m) / s. Layers without weights or statistics of their own stay.

    Args:
        network: In eval mode, and left so.
        clean: Images to measure on.
        augment: Random crops and flips, as the training that follows."""
    layers = {name: norm for name, norm in norms(network).items() if norm.affine and norm.running_mean is not None}
    if not layers:
        return network.eval()
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [layer.register_forward_pre_hook(partial(_noted, seen[name])) for name, layer in layers.items()]
    batches = clean.endless(PASS_BATCH, runtime=runtime, seed=runtime.seed, augment=augment)
    try:
        for _ in range(PASS_IMAGES // PASS_BATCH):
            with runtime.autocast():
                network.eval()(next(batches)[0])
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer in layers.items():
        if seen[name]:
            _move(layer, torch.stack(seen[name]).sum(0))
    return network


def _noted(seen: list[Tensor], _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Add the sums over channels of 1, x and x^2, (3, C), of what a layer is given."""
    values = inputs[0].transpose(0, 1).flatten(1).double()
    seen.append(torch.stack([torch.ones_like(values).sum(1), values.sum(1), values.square().sum(1)]))


def _move(layer: _BatchNorm, sums: Tensor) -> None:
    assert layer.running_mean is not None and layer.running_var is not None
    count, total, square = sums
    mean = total / count
    var = (square / count - mean.square()).clamp_min(0)
    scale = (layer.running_var.double() + layer.eps).sqrt()
    layer.bias.add_(layer.weight * (mean - layer.running_mean) / scale)
    layer.weight.mul_((var + layer.eps).sqrt() / scale)
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)
