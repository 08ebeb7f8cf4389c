"""Where a network's whole stream passes: cuts that no skip connection bypasses, found by running it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Site", "last_cut"]

WEIGHTS = (nn.Conv2d, nn.Linear)


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
    calls: list[tuple[str, torch.Size]] = []
    pooled: set[str] = set()

    def note(name: str, args: tuple[Any, ...]) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor) and args[0].ndim in (3, 4):
            calls.append((name, args[0].shape))

    def end(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 2:
            pooled.add(name)

    inner = {name: module for name, module in network.named_modules() if name and _has_weights(module)}
    with torch.no_grad(), _hooked(inner, note, end):
        network(images)
    names = [name for name, _ in calls]
    body = [
        Site(name, shape[axis], axis)
        for name, shape in calls
        if names.count(name) == 1 and name not in pooled and (axis := _channel_axis(network, shape))
    ]
    wide = [site for site in body if dict(calls)[site.name][1:].numel() > site.channels]  # more than one place in the image
    for site in reversed(wide or body):
        if _is_cut(network, inner[site.name], images):
            return site
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


def _channel_axis(network: nn.Module, shape: torch.Size) -> int:
    """1 in NCHW, -1 in NHWC and (B, N, C); square images tell the first two apart."""
    if len(shape) == 3:
        return -1
    if shape[1] == shape[2] != shape[3] or (shape[1] == shape[2] == shape[3] and getattr(network, "output_fmt", "") == "NHWC"):
        return -1
    return 1
