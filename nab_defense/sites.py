"""Where a network's whole stream passes: cuts that no skip connection bypasses, found by running it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Site", "last_cut"]

WEIGHTS = (nn.Conv2d, nn.Linear)
Call = tuple[str, torch.Size]  # of a module, with the shape of what it was given


@dataclass(frozen=True)
class Site:
    """The input of a module: its name in the network, the number of channels, and the axis they lie on."""

    name: str
    channels: int
    axis: int


@contextmanager
def _hooked(modules: dict[str, nn.Module], before: Any, after: Any) -> Iterator[None]:
    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(lambda m, args, name=name: before(name, args)))
        handles.append(module.register_forward_hook(lambda m, args, output, name=name: after(name, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def last_cut(network: nn.Module, images: Tensor) -> Site:
    """The last place before the head where all of the stream goes through one module that has weights.

    That is the last block of a residual or token network, the last convolution of a plain one. Whether anything bypasses the
    module is tried out: with its input cut from the graph no gradient may reach the image.

    Args:
        network: Any network, in eval mode.
        images: (B, C, H, W), what it takes.

    Raises:
        ValueError: There is no such place."""
    calls: list[Call] = []
    pooled: set[str] = set()

    def note(name: str, args: tuple[Any, ...]) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor):
            calls.append((name, args[0].shape))

    def end(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 2:
            pooled.add(name)

    modules = dict(network.named_modules())
    with torch.no_grad(), _hooked({name: module for name, module in modules.items() if name}, note, end):
        network(images)
    names = [name for name, _ in calls]
    body = [
        (place, name, shape)
        for place, (name, shape) in enumerate(calls)
        if len(shape) in (3, 4) and _has_weights(modules[name]) and names.count(name) == 1 and name not in pooled
    ]
    wide = [call for call in body if call[2][1:].numel() > max(call[2][1:])]  # more than one place in the image
    for place, name, shape in reversed(wide or body):
        if _is_cut(network, modules[name], images):
            axis = _channel_axis(modules, calls[place:])
            return Site(name, shape[axis], axis)
    raise ValueError("no layer of this network sees all of its stream, so that no polarizer can be put in")


def _has_weights(module: nn.Module) -> bool:
    return any(isinstance(part, WEIGHTS) for part in module.modules())


def _is_cut(network: nn.Module, module: nn.Module, images: Tensor) -> bool:
    handle = module.register_forward_pre_hook(lambda m, args: (args[0].detach(),))
    try:
        images = images.detach().requires_grad_(True)
        output = network(images)
        if not output.requires_grad:
            return True
        (slope,) = torch.autograd.grad(output.sum(), images, allow_unused=True)
    finally:
        handle.remove()
    return slope is None


def _channel_axis(modules: dict[str, nn.Module], calls: Sequence[Call]) -> int:
    """Where the channels of what the first of these calls is given lie: 1 in NCHW, -1 in NHWC and in tokens, (B, N, C) or more.

    The first module in it or after it tells that expects as many channels as one of the two axes has, and not the other; or
    that is given a tensor of the same shape, whose channel axis follows from its kind.

    Raises:
        ValueError: None of them tells."""
    name, shape = calls[0]
    if len(shape) == 3:
        return -1
    for inner, given in calls:
        count, axis = _expects(modules[inner])
        if axis is not None and given == shape and count == shape[axis]:
            return axis
        if (count == shape[1]) != (count == shape[-1]):
            return 1 if count == shape[1] else -1
    raise ValueError(f"nothing tells which axis of {tuple(shape)}, the input of {name}, holds the channels")


def _expects(module: nn.Module) -> tuple[int | None, int | None]:
    """How many channels a layer takes, and on which axis; None: unknown. Some layer norms turn NCHW around inside."""
    match module:
        case nn.Linear():
            return module.in_features, -1
        case nn.Conv2d():
            return module.in_channels, 1
        case _BatchNorm():
            return module.num_features, 1
        case nn.GroupNorm():
            return module.num_channels, 1
        case nn.LayerNorm() if len(module.normalized_shape) == 1:
            return module.normalized_shape[0], None
    return None, None
