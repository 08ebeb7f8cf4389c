"""Changes: what is done alike to every image to turn it to one class; spread over it, as a patch, or as a warp."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .runtime import Runtime

__all__ = [
    "GRID",
    "SEARCH",
    "START",
    "START_IMAGES",
    "Patch",
    "Spread",
    "Universal",
    "Warp",
    "boxed",
    "climbed",
    "noisy_slopes",
    "projected",
    "promise",
]

PACE = 0.2  # of the radius, a step of a change that has one
STRIDE, MOMENTUM = 0.2, 0.9  # of the pixel range, the first step of a patch; how much of its course it keeps
START, START_IMAGES, START_SHARE = 4, 32, 0.5  # first steps of each, and the share of the radius they stay in
SEARCH, CLIMBS, CLIMB_IMAGES = 6, 6, 16  # draws of one search for a patch's pattern, steps at each draw, on so many images
SHOWN, TRIED, NOISE = 8, 8, 0.2  # images on which a patch tries places, places at once; standard deviation, of the pixel range
TIRED = 0.15  # a patch that turns fewer when its search ends is given another place
GRID = 4  # points along each side that a warp moves


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


def _norm(change: Tensor) -> Tensor:
    return change.flatten(-3).norm(dim=-1).clamp_min(1e-12)[..., None, None, None]


@dataclass(eq=False)
class Universal(ABC):
    """One change of the pixels toward one class.

    A trigger that is blended in is near a spread change, one that is stuck on is near a patch: a white square has an L2 norm at
    which a spread change turns any network, but no other square of its size does. One that moves the pixels is near a warp.

    Args:
        wanted: The class.
        change: What is done to the images.
        rate: Share of images of other classes that it turned of late, in [0, 1].
        excess: By how much it turned more, when it was made, than the changes of its kind toward other classes usually do.
        drawn: How often it was drawn.
    """

    longer: ClassVar[tuple[int, int]] = START, START_IMAGES  # steps and images of a search that goes on

    wanted: int
    change: Tensor
    rate: float = field(default=0.0, kw_only=True)
    excess: float = field(default=0.0, kw_only=True)
    drawn: int = field(default=0, kw_only=True)

    @abstractmethod
    def painted(self, images: Tensor, change: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [0, 1] with the change, or with another one like it; differentiable by it."""

    def climb(self, network: nn.Module, images: Tensor, *, strength: float, runtime: Runtime) -> None:
        """One step toward the class, on images of other classes; the network in eval mode.

        Args: strength: Share of the radius, or of a patch's first step, in (0, 1]."""
        change = self.change.detach().requires_grad_(True)
        with runtime.autocast():
            likely = network(self.painted(images, change)).float().log_softmax(1)[:, self.wanted].mean()
        (slope,) = torch.autograd.grad(likely, change)
        self._step(slope, strength)

    @abstractmethod
    def _step(self, slope: Tensor, strength: float) -> None:
        """Move the change along the slope of its class's likelihood."""

    def follow(self, network: nn.Module, images: Tensor, *, strength: float, runtime: Runtime) -> None:
        """Climb on a network that is trained against this change, when it is drawn.

        Args: strength: Share of the radius, in (0, 1]."""
        self.climb(network, images, strength=strength, runtime=runtime)

    def strength(self, part: float) -> float:
        """Of the steps of a search, after this part of them."""
        return START_SHARE

    @property
    def tired(self) -> bool:
        """A search of it, over several draws, ended with few images turned: another place, or frequency, may turn more."""
        return (self.drawn - 1) % SEARCH == 0 and self.rate < TIRED

    def _works(self, network: nn.Module, shown: Tensor, runtime: Runtime) -> Tensor:
        """(T,): how likely images (T, B, C, H, W) are given the class on average, by each of T ways to show the change."""
        with runtime.autocast():
            logits = network(shown.flatten(0, 1)).float()
        return logits.log_softmax(1)[:, self.wanted].view(len(shown), -1).mean(1)

    def blank(self) -> Self:
        """One like it that is still to be made."""
        return replace(self, change=torch.zeros_like(self.change), rate=0.0, drawn=0)

    def copied(self) -> Self:
        """One to go on from, while this one stays as it is."""
        return replace(self)


@dataclass(eq=False)
class Spread(Universal):
    """Something added: (C, H, W).

    Args:
        radius: Largest L2 norm of it.
    """

    radius: float

    def painted(self, images: Tensor, change: Tensor | None = None) -> Tensor:
        return boxed(images + (self.change if change is None else change))

    def _step(self, slope: Tensor, strength: float) -> None:
        radius = strength * self.radius
        self.change = climbed(self.change, slope, step=PACE * radius, radius=radius)


@dataclass(eq=False)
class Warp(Spread):
    """Pixels moved: (2, GRID, GRID), how far the points of a grid move to the right and down, in pixels; smooth in between.

    Args:
        radius: Largest L2 norm of the points' ways.
    """

    def follow(self, network: nn.Module, images: Tensor, *, strength: float, runtime: Runtime) -> None:
        """At no less than the share of the radius that it was found at: of shorter ways a network unlearns nothing."""
        super().follow(network, images, strength=max(strength, START_SHARE), runtime=runtime)

    def painted(self, images: Tensor, change: Tensor | None = None) -> Tensor:
        height, width = images.shape[2:]
        points = self.change if change is None else change
        ways = F.interpolate(points[None], (height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
        rows, columns = (torch.linspace(-1, 1, edge, device=images.device) for edge in (height, width))
        still = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
        moved = still + ways * 2 / torch.tensor([width - 1, height - 1], device=images.device)
        return F.grid_sample(images, moved.expand(len(images), -1, -1, -1), padding_mode="border", align_corners=True)


@dataclass(eq=False)
class Patch(Universal):
    """Something in place of what was there: (C, H, W), shown where the mask is 1.

    Args:
        edge: Of the patch, in pixels.
        mask: (1, H, W), 1 where the patch is; None: it has no place yet.
        course: (C, H, W), sum of its late slopes; 0: it took no step yet.
    """

    longer: ClassVar[tuple[int, int]] = SEARCH * CLIMBS, CLIMB_IMAGES  # a spread change turns any network in as many

    edge: int
    mask: Tensor | None = None
    course: Tensor | float = 0.0

    def painted(self, images: Tensor, change: Tensor | None = None) -> Tensor:
        change = self.change if change is None else change
        return images if self.mask is None else _shown(images, self.mask, change)

    def climb(self, network: nn.Module, images: Tensor, *, strength: float, runtime: Runtime) -> None:
        if self.mask is None:
            self._settle(network, images, runtime)
        super().climb(network, images, strength=strength, runtime=runtime)

    def _step(self, slope: Tensor, strength: float) -> None:
        # Short steps in the end, and a course: what is left of a patch trigger is a narrow peak, which long ones step across.
        self.course = MOMENTUM * self.course + slope / slope.abs().mean().clamp_min(1e-12)
        self.change = (self.change + strength * STRIDE * self.course.sign()).clamp(0, 1)

    def follow(self, network: nn.Module, images: Tensor, *, strength: float, runtime: Runtime) -> None:
        """Some of a search's steps. One that ends with few images turned is followed by one at the place that now promises the
        most: there what the training left of a backdoor is found again."""
        if self.tired:
            self._settle(network, images, runtime)
        turn = (self.drawn - 1) % SEARCH
        for step in range(CLIMBS):
            self.climb(network, images[:CLIMB_IMAGES], strength=self.strength((turn + step / CLIMBS) / SEARCH), runtime=runtime)

    def strength(self, part: float) -> float:
        return 1 - part

    def blank(self) -> Self:
        return replace(super().blank(), mask=None)

    def copied(self) -> Self:
        return replace(self, course=0.0)

    @torch.no_grad()
    def _settle(self, network: nn.Module, images: Tensor, runtime: Runtime) -> None:
        """Find a place for the patch: patterns are shown all over the image, and the one that works best stays where it does.
        They are what raises the class's logit under noise, in black and white; and plain white and black, since the slope at a
        place tells little of patterns far from what is there."""
        with torch.enable_grad():
            (slope,) = noisy_slopes(network, images, [self.wanted], runtime)
        shown, best, self.course = images[:SHOWN], -torch.inf, 0.0
        places = itertools.product(*(_spaced(size - self.edge, self.edge // 2 + 1) for size in slope.shape[1:]))
        masks = torch.stack([self._mask(slope, top, left) for top, left in places])
        for pattern in ((slope > 0).to(slope.dtype), torch.ones_like(slope), torch.zeros_like(slope)):
            for some in masks.split(TRIED):
                works = self._works(network, _shown(shown, some[:, None], pattern), runtime)
                if (most := float(works.max())) > best:
                    best, self.mask, self.change = most, some[works.argmax()], pattern

    def _mask(self, like: Tensor, top: int, left: int) -> Tensor:
        mask = torch.zeros_like(like[:1])
        mask[:, top : top + self.edge, left : left + self.edge] = 1
        return mask


def _shown(images: Tensor, mask: Tensor, change: Tensor) -> Tensor:
    """Images with the change where the mask is 1; shapes that broadcast."""
    return images + mask * (change - images)


def _spaced(last: int, stride: int) -> list[int]:
    """0, stride, and so on, up to `last`, which is always among them."""
    return [*range(0, last, stride), last]


def noisy_slopes(network: nn.Module, images: Tensor, classes: list[int], runtime: Runtime) -> Iterator[Tensor]:
    """(C, H, W) for each class: how its mean logit rises with a change of noisy images (B, C, H, W).

    At clean images the slope follows their content: there it misses backdoors that it always shows under noise."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(runtime.seed)).to(images.device)
    added = torch.zeros_like(images[0]).requires_grad_(True)
    with runtime.autocast():
        logits = network(boxed(images + NOISE * noise) + added).float().mean(0)
    for place, label in enumerate(classes, start=1):
        yield torch.autograd.grad(logits[label], added, retain_graph=place < len(classes))[0]


def promise(slope: Tensor, images: Tensor, edge: int) -> Tensor:
    """What a patch of black and white would gain at each place, by the slope (C, H, W): (H - edge + 1, W - edge + 1)."""
    mean = images.mean(0)
    gain = torch.maximum(slope * (1 - mean), -slope * mean).sum(0, keepdim=True)
    return F.avg_pool2d(gain[None], edge, 1)[0, 0]
