"""Universal perturbations: one change that turns all images to one class, the nearest thing to an unknown trigger."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clean import CleanSet
from .runtime import Runtime

__all__ = ["PROBE_BATCH", "Pool", "Universal", "boxed", "climbed", "likely_classes", "pool_of", "projected", "pursued", "started"]

PACE = 0.2  # of the radius, a step of a spread change
STRIDE, MOMENTUM = 0.2, 0.9  # of the pixel range, the first step of a patch; how much of its course it keeps
START, START_IMAGES, START_SHARE = 4, 32, 0.5  # first steps of each, and the share of the radius they stay in
SEARCH, CLIMBS, CLIMB_IMAGES = 6, 6, 16  # draws of one search for a patch's pattern, steps at each draw, on so many images
TURNS, DOUBLINGS = 0.5, 2  # the radius doubles, so often at most, until one spread change turns this share of images
EASY = 0.5  # of the largest excess: changes with less are not suspicious
FLOOR, SHARPNESS = 0.05, 4.0  # a change is drawn in proportion to this power of the share of images it turns
PLACES, NOISE = 4, 0.2  # that a patch tries; standard deviation, of the pixel range
PROBE_BATCH, PROBE_CLASSES = 48, 10
SMALLEST_PATCH = 3  # pixels
TIRED = 0.15  # a patch that turns fewer when its search ends begins another one where it was found


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
class Universal:
    """One change of the pixels toward one class: spread over the image, or a patch in place of what was there.

    A trigger that is blended in is near the first kind, one that is stuck on is near the second: a white square has an L2 norm at
    which a spread change turns any network, but no other square of its size does.

    Args:
        wanted: The class.
        change: (C, H, W): what is added; of a patch, what is shown.
        radius: Largest L2 norm of what is added; None: a patch.
        edge: Of the patch, in pixels.
        mask: (1, H, W), 1 where the patch is; None: it has no place yet.
        found: The change and its mask as they were made; None: they are not yet.
        course: (C, H, W), sum of a patch's late slopes; 0: it took no step yet.
        rate: Share of images of other classes that it turned of late, in [0, 1].
        excess: By how much it turned more, when it was made, than the changes of its kind toward other classes usually do.
    """

    wanted: int
    change: Tensor
    radius: float | None
    edge: int
    mask: Tensor | None = None
    rate: float = 0.0
    excess: float = 0.0
    drawn: int = 0
    found: tuple[Tensor, Tensor | None] | None = None
    course: Tensor | float = 0.0

    def painted(self, images: Tensor, change: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) in [0, 1] with the change, or with another one like it; differentiable by it."""
        change = self.change if change is None else change
        if self.radius is not None:
            return boxed(images + change)
        return images if self.mask is None else images + self.mask * (change - images)

    def climb(self, network: nn.Module, images: Tensor, *, strength: float, runtime: Runtime) -> None:
        """One step toward the class, on images of other classes; the network in eval mode.

        Args: strength: Share of the radius, or of a patch's first step, in (0, 1]."""
        if self.radius is None and self.mask is None:
            self._settle(network, images, runtime)
        change = self.change.detach().requires_grad_(True)
        with runtime.autocast():
            likely = network(self.painted(images, change)).float().log_softmax(1)[:, self.wanted].mean()
        (slope,) = torch.autograd.grad(likely, change)
        if self.radius is None:
            # Short steps in the end, and a course: what is left of a patch trigger is a narrow peak, which long ones step across.
            self.course = MOMENTUM * self.course + slope / slope.abs().mean().clamp_min(1e-12)
            self.change = (self.change + strength * STRIDE * self.course.sign()).clamp(0, 1)
        else:
            radius = strength * self.radius
            self.change = climbed(self.change, slope, step=PACE * radius, radius=radius)

    def follow(self, network: nn.Module, images: Tensor, *, strength: float, runtime: Runtime) -> None:
        """Climb on a network that is trained against this change, when it is drawn: one step, or some of a patch's search.

        A search that ends with few images turned is followed by one from the pattern that turned the original network, at the
        next of the places around: there what the training left of a backdoor is found again, see `around`.

        Args: strength: Share of the radius, in (0, 1]."""
        if self.radius is not None:
            self.climb(network, images, strength=strength, runtime=runtime)
            return
        searches, turn = divmod(self.drawn - 1, SEARCH)
        if turn == 0 and self.rate < TIRED and self.found is not None:
            places = self.around()
            next_one = places[searches % len(places)]
            self.change, self.mask, self.course = next_one.change, next_one.mask, next_one.course
        for step in range(CLIMBS):
            self.climb(network, images[:CLIMB_IMAGES], strength=1 - (turn + step / CLIMBS) / SEARCH, runtime=runtime)

    def around(self) -> list[Universal]:
        """The change as it was made; of a patch also at eight places around, nearer than its edge.

        A network that holds a trigger obeys patches that cover a part of it. One that was trained against such a patch may still
        obey the trigger, and then nothing at that place shows it."""
        assert self.found is not None
        change, mask = self.found
        if mask is None:
            return [replace(self, change=change, course=0.0)]
        stride = self.edge // 2 + 1
        shifts = sorted(itertools.product((0, -stride, stride), repeat=2), key=lambda shift: shift != (0, 0))
        return [replace(self, change=change, mask=_shifted(mask, *shift), course=0.0) for shift in shifts]

    def _settle(self, network: nn.Module, images: Tensor, runtime: Runtime) -> None:
        """Find a place for the patch: of those that promise the most, the one that keeps its promise.

        The promise is the slope of the class's logit under noise times the way to black or white."""
        (slope,) = _noisy_slopes(network, images, [self.wanted], runtime)
        inside, best, near = _promise(slope, images, self.edge), -torch.inf, self.edge // 2
        self.change = (slope > 0).to(slope.dtype)
        for _ in range(PLACES):
            top, left = divmod(int(inside.argmax()), inside.shape[1])
            inside[max(0, top - near) : top + near + 1, max(0, left - near) : left + near + 1] = -torch.inf
            mask = torch.zeros_like(slope[:1])
            mask[:, top : top + self.edge, left : left + self.edge] = 1
            with torch.no_grad(), runtime.autocast():
                logits = network(replace(self, mask=mask).painted(images)).float()
            kept = float(logits.log_softmax(1)[:, self.wanted].mean())
            if kept > best:
                best, self.mask = kept, mask


def started(network: nn.Module, one: Universal, batches: Iterator[tuple[Tensor, Tensor]], runtime: Runtime) -> Universal:
    """The change made anew by a few steps on this network, in eval mode.

    Args: batches: (images, rows), on the device; a few images of each are used, those that are not of the class."""
    fresh = replace(one, change=torch.zeros_like(one.change), mask=None, rate=0.0, drawn=0, course=0.0)
    _search(network, [fresh], batches, runtime, steps=START, count=START_IMAGES)
    fresh.found, images = (fresh.change, fresh.mask), _others(network, batches, one.wanted, runtime)
    with torch.no_grad(), runtime.autocast():
        fresh.rate = float((network(fresh.painted(images)).argmax(1) == one.wanted).float().mean())
    return fresh


def pursued(network: nn.Module, one: Universal, batches: Iterator[tuple[Tensor, Tensor]], runtime: Runtime) -> list[Universal]:
    """The change as it was made, and those around, after more steps on this network, in eval mode: all on the same images.

    Args: batches: As in started."""
    places = one.around()
    # a spread change turns any network in as many steps as a patch needs
    steps, count = (SEARCH * CLIMBS, CLIMB_IMAGES) if one.radius is None else (START, START_IMAGES)
    _search(network, places, batches, runtime, steps=steps, count=count)
    return places


def _search(
    network: nn.Module,
    ones: list[Universal],
    batches: Iterator[tuple[Tensor, Tensor]],
    runtime: Runtime,
    *,
    steps: int,
    count: int,
) -> None:
    """So many steps of changes of one kind and class, each step on the same `count` images; a patch's strides fall."""
    wanted, patches = ones[0].wanted, ones[0].radius is None
    for step in range(steps):
        images = _others(network, batches, wanted, runtime)[:count]
        for one in ones:
            one.climb(network, images, strength=1 - step / steps if patches else START_SHARE, runtime=runtime)


@torch.no_grad()
def _others(network: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], wanted: int, runtime: Runtime) -> Tensor:
    """The next few images that the network does not give the class; any, where it gives it to all."""
    images = next(batches)[0]
    with runtime.autocast():
        found = images[network(images).argmax(1) != wanted]
    return (found if len(found) else images)[:START_IMAGES]


def _shifted(mask: Tensor, down: int, right: int) -> Tensor:
    """The mask (1, H, W) moved by so many pixels, or as many as the image leaves."""
    rows, columns = mask[0].any(1).nonzero().squeeze(1).tolist(), mask[0].any(0).nonzero().squeeze(1).tolist()
    down = min(max(down, -rows[0]), mask.shape[1] - 1 - rows[-1])
    right = min(max(right, -columns[0]), mask.shape[2] - 1 - columns[-1])
    return mask.roll((down, right), (1, 2))


class Pool:
    """Two changes for each likely class, one of each kind; the more images one that stands out turns, the more often it is drawn.

    Made on the suspicious network, where a backdoor turns images far more easily than the changes toward other classes do. To
    train against these, too, would cost accuracy and gain nothing.

    Args:
        network: Takes pixels; in eval mode, and left so.
        batches: Endless (images, rows), on the device.
        radius: Of spread changes, L2; it is doubled where none of them turns half of the images.
        edge: Of patches, in pixels.
        runtime: Device, precision, seed.
    """

    def __init__(
        self,
        network: nn.Module,
        batches: Iterator[tuple[Tensor, Tensor]],
        *,
        radius: float,
        edge: int,
        runtime: Runtime,
    ) -> None:
        self.generator = torch.Generator().manual_seed(runtime.seed)
        images, _ = next(batches)
        blank, classes = torch.zeros_like(images[0]), likely_classes(network, images, edge=edge, runtime=runtime)
        self.changes: list[Universal] = []
        for first in (radius, None):
            ones = [started(network, Universal(k, blank, first, edge), batches, runtime) for k in classes]
            for _ in range(DOUBLINGS):
                if first is None or max(one.rate for one in ones) >= TURNS:
                    break
                first *= 2
                ones = [started(network, replace(one, radius=first), batches, runtime) for one in ones]
            usual = statistics.median(one.rate for one in ones)
            for one in ones:
                one.excess = one.rate - usual
            self.changes += ones
        self.changes.sort(key=lambda one: -one.excess)
        self.suspicious = [one for one in self.changes if one.excess >= EASY * self.changes[0].excess]

    def draw(self) -> Universal:
        weights = torch.tensor([max(one.rate, FLOOR) for one in self.suspicious]) ** SHARPNESS
        one = self.suspicious[int(torch.multinomial(weights, 1, generator=self.generator))]
        one.drawn += 1
        return one


def _noisy_slopes(network: nn.Module, images: Tensor, classes: list[int], runtime: Runtime) -> Tensor:
    """(K, C, H, W): how the mean logit of each class rises with a change of noisy images (B, C, H, W).

    At clean images the slope follows their content: there it misses backdoors that it always shows under noise."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(runtime.seed)).to(images.device)
    added = torch.zeros_like(images[0]).requires_grad_(True)
    with runtime.autocast():
        logits = network(boxed(images + NOISE * noise) + added).float().mean(0)
    return torch.stack([torch.autograd.grad(logits[k], added, retain_graph=True)[0] for k in classes])


def _promise(slope: Tensor, images: Tensor, edge: int) -> Tensor:
    """What a patch of black and white would gain at each place, by the slope (C, H, W): (H - edge + 1, W - edge + 1)."""
    mean = images.mean(0)
    gain = torch.maximum(slope * (1 - mean), -slope * mean).sum(0, keepdim=True)
    return F.avg_pool2d(gain[None], edge, 1)[0, 0]


def likely_classes(network: nn.Module, images: Tensor, *, edge: int, runtime: Runtime) -> list[int]:
    """All classes; where there are more than PROBE_CLASSES, those whose logits climb best by a change or by a patch.

    Args: images: (B, C, H, W) in [0, 1]. edge: Of the patch, in pixels."""
    with torch.no_grad():
        count = network(images[:1]).shape[1]
    if count <= PROBE_CLASSES:
        return list(range(count))
    slopes = _noisy_slopes(network, images, list(range(count)), runtime)
    spread, patched = slopes.flatten(1).norm(dim=1), torch.stack([_promise(slope, images, edge).max() for slope in slopes])
    first = torch.stack([order.argsort(descending=True) for order in (spread, patched)], dim=1).flatten().tolist()
    return list(dict.fromkeys(first))[:PROBE_CLASSES]


def pool_of(network: nn.Module, clean: CleanSet, *, radius: float, patch: int, runtime: Runtime) -> Pool:
    """Universal perturbations toward all likely classes; radius and patch at 32 px, see universal.Pool."""
    batches = clean.endless(PROBE_BATCH, runtime=runtime, seed=runtime.seed, augment=False)
    edge = min(max(SMALLEST_PATCH, round(patch * clean.scale)), *clean.images.shape[2:])
    return Pool(network, batches, radius=radius * clean.scale, edge=edge, runtime=runtime)
