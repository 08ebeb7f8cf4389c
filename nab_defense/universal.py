"""Universal perturbations: one change of the pixels that turns many images at once, the nearest thing to an unknown trigger."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ascended", "boxed", "climbed", "projected"]


def boxed(pixels: Tensor) -> Tensor:
    """Pixels clipped to [0, 1], with the gradient of pixels that are not.

    A clip gives none at black and white, so that a corner which is black in every image could never be changed."""
    return pixels + (pixels.clamp(0, 1) - pixels).detach()


def projected(change: Tensor, radius: float) -> Tensor:
    """The change (..., C, H, W), each scaled down to an L2 norm of at most `radius`."""
    return change * (radius / _norm(change)).clamp(max=1)


def climbed(change: Tensor, slope: Tensor, *, step: float, radius: float) -> Tensor:
    """The change after a step of length `step` along the slope, within the ball of this radius."""
    return projected(change.detach() + step * slope / _norm(slope), radius)


def ascended(change: Tensor, value: Callable[[Tensor], Tensor], *, step: float, radius: float) -> Tensor:
    """The change after one step up the gradient of value(change)."""
    change = change.detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(value(change), change)
    return climbed(change, slope, step=step, radius=radius)


def _norm(change: Tensor) -> Tensor:
    return change.flatten(-3).norm(dim=-1).clamp_min(1e-12)[..., None, None, None]
