"""Waves: changes of one spatial frequency, as a patch is one of one place."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from .changes import SHOWN, START_SHARE, TRIED, Spread, boxed
from .runtime import Runtime

__all__ = ["Wave"]

MOST = 8  # times that it goes up and down across an image; more are not tried
PHASES = 0.0, 0.25  # of a period; its steps move it along


@dataclass(eq=False)
class Wave(Spread):
    """A plane wave that is added: (C, H, W), in each channel of a height and a phase of its own.

    Networks go by single frequencies as readily as by single places [Tsuzuku and Sato 2019, arXiv:1809.04098], and a trigger that
    is spread over an image may be little else; but at clean images the slope does not lead there, so that waves are tried.

    Args:
        radius: Largest L2 norm of it.
        cycles: How often it goes up and down, from top to bottom and from left to right; None: not chosen yet.
    """

    cycles: tuple[int, int] | None = None

    def painted(self, images: Tensor, change: Tensor | None = None) -> Tensor:
        """Of another change only what is of this frequency, so that slopes are, too."""
        if change is not None and self.cycles is not None:
            shapes = _basis(self.cycles, change)[:, None]  # no matrix products: these would be rounded to bfloat16
            change = (shapes * (shapes * change).sum((-2, -1), keepdim=True)).sum(0)
        return super().painted(images, change)

    def climb(self, network: nn.Module, images: Tensor, *, strength: float, runtime: Runtime) -> None:
        if self.cycles is None:
            self._settle(network, images, strength, runtime)
        super().climb(network, images, strength=strength, runtime=runtime)

    def follow(self, network: nn.Module, images: Tensor, *, strength: float, runtime: Runtime) -> None:
        """At no less than the share of the radius that it was found at, as a warp; of another frequency now and then, where it
        turns few."""
        if self.tired:
            self._settle(network, images, START_SHARE, runtime)
        self.climb(network, images, strength=max(strength, START_SHARE), runtime=runtime)

    def blank(self) -> Self:
        return replace(super().blank(), cycles=None)

    @torch.no_grad()
    def _settle(self, network: nn.Module, images: Tensor, strength: float, runtime: Runtime) -> None:
        """Take the wave, alike in all channels, with which a few images are most readily given the class."""
        shown = images[:SHOWN]
        down, right = (min(MOST, (edge - 1) // 2) for edge in images.shape[2:])  # of more there is no sine in so few pixels
        ways = [*((count, 0) for count in range(1, down + 1)), *itertools.product(range(-down, down + 1), range(1, right + 1))]
        waves = torch.cat([_basis(cycles, images[0]) for cycles in ways])
        waves *= strength * self.radius / images.shape[1] ** 0.5
        best, place = -torch.inf, 0
        for number, some in enumerate(waves.split(TRIED)):
            works = self._works(network, boxed(shown + some[:, None, None]), runtime)
            if (most := float(works.max())) > best:
                best, place = most, number * TRIED + int(works.argmax())
        self.cycles = ways[place // len(PHASES)]
        self.change = waves[place].expand_as(images[0]).clone()


def _basis(cycles: tuple[int, int], like: Tensor) -> Tensor:
    """(2, H, W): the wave and itself a quarter of a period on, of norm 1 each, for images (C, H, W)."""
    rows, columns = (torch.arange(edge, device=like.device) / edge for edge in like.shape[1:])
    turns = cycles[0] * rows[:, None] + cycles[1] * columns
    waves = torch.stack([torch.sin(2 * math.pi * (turns + phase)) for phase in PHASES])
    return waves / waves.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
