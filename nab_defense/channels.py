"""Channels: which weights count some, what the network does with each scaled, and without them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["Channel", "Masks", "maskable", "masked", "prune", "ranking"]

Channel = tuple[str, int]
Masks = dict[str, Tensor]
Layer = nn.Linear | nn.Conv2d
Norm = nn.modules.batchnorm._BatchNorm | nn.GroupNorm


def maskable(network: nn.Module) -> dict[str, int]:
    """The weights whose first axis counts channels that can be switched off one by one: name, number of channels.

    These are the scales of normalisations over channels, and the hidden units of MLPs: a layer that acts on each position
    alone and widens it, before one of the same module that takes what it gives (or half of it, where it is gated). Where a
    network has neither: the outputs of every convolution and linear layer but the last. A LayerNorm's scale is an axis of the
    features, not a neuron, and is left alone."""
    parts = [(name, module) for name, module in network.named_modules() if isinstance(module, Layer | Norm) and _plain(module)]
    found = {f"{name}.weight": len(m.weight) for name, m in parts if isinstance(m, Norm) and m.weight is not None}
    mlps = [one for one, two in pairwise(parts) if _parent(one[0]) == _parent(two[0]) and _widens(one[1], two[1])]
    found |= {f"{name}.weight": len(first.weight) for name, first in mlps}
    if found:
        return found
    layers = [(name, module) for name, module in parts if isinstance(module, Layer)]
    # a convolution that standardises its weight undoes a mask on it; its gain is what scales the output
    gains = {name: "gain" if isinstance(getattr(module, "gain", None), nn.Parameter) else "weight" for name, module in layers}
    return {f"{name}.{gains[name]}": len(module.weight) for name, module in layers[:-1]}


def _plain(module: nn.Module) -> bool:
    """Whether its weight is a parameter, or it has none; a parametrised one is computed anew, and cannot be scaled in place."""
    return module.weight is None or "weight" in module._parameters


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _widens(first: nn.Module, second: nn.Module) -> bool:
    """Whether these are the two layers of an MLP's block."""
    if not (isinstance(first, Layer) and isinstance(second, Layer)):
        return False
    if any(isinstance(layer, nn.Conv2d) and (layer.kernel_size != (1, 1) or layer.groups > 1) for layer in (first, second)):
        return False
    (hidden, taken), given = first.weight.shape[:2], second.weight.shape[1]
    return hidden > taken and hidden in (given, 2 * given)


def masked(network: nn.Module, masks: Masks, images: Tensor) -> Tensor:
    """The network's output with each named weight scaled channel by channel; gradients reach the masks alone.

    Args: masks: Name of a weight to its mask (channels,)."""
    weights = {name: network.get_parameter(name).detach() for name in masks}
    scaled = {name: weight * masks[name].view(-1, *[1] * (weight.ndim - 1)) for name, weight in weights.items()}
    return torch.func.functional_call(network, scaled, (images,))


def ranking(masks: Masks) -> list[Channel]:
    """(name of the weight, channel) of all masks, the lowest first; ties in their order."""
    channels = [(name, index) for name, mask in masks.items() for index in range(len(mask))]
    order = torch.cat(list(masks.values())).sort(stable=True).indices
    return [channels[place] for place in order.tolist()]


@torch.no_grad()
def prune(network: nn.Module, channels: list[Channel]) -> None:
    """Zero these channels' weights in place; a bias stays, so that the channel becomes a constant."""
    for name in {name for name, _ in channels}:
        network.get_parameter(name)[[index for other, index in channels if other == name]] = 0
