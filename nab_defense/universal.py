"""Universal perturbations: one change that turns all images to one class, the nearest thing to an unknown trigger."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .changes import GRID, START, START_IMAGES, Patch, Spread, Universal, Warp, noisy_slopes, promise
from .clean import CleanSet
from .ranks import watched
from .runtime import Runtime
from .waves import Wave

__all__ = ["PROBE_BATCH", "Pool", "likely_classes", "pool_of", "pursued", "started"]

TURNS, FACTORS = 0.5, (2.0, 1.5)  # the radius is changed by these until some spread changes turn this share of images, not most
EASY, RIVAL = 0.5, 0.75  # of the largest excess: changes with less, toward its class and toward others, are not suspicious
CLEAR, MANY = 0.7, 240  # share of so many images that the change which stands out most must turn, or waves are tried, too
FLOOR, SHARPNESS = 0.05, 4.0  # a change is drawn in proportion to this power of how many images it turns, times its excess
PROBE_BATCH, PROBE_CLASSES = 48, 10
FEW_IMAGES = 16  # that choose among more classes, each of which costs a backward pass
KINDS: dict[str, type[Universal]] = {kind.__name__: kind for kind in (Spread, Patch, Warp, Wave)}
SMALLEST_PATCH = 3  # pixels
WAY = 1.0  # pixels that the points of a warp move up to 32 px, a root mean square of either direction; more in larger images


def started(network: nn.Module, one: Universal, batches: Iterator[tuple[Tensor, Tensor]], runtime: Runtime) -> Universal:
    """The change made anew by a few steps on this network, in eval mode.

    Args: batches: (images, rows), on the device; a few images of each are used, those that are not of the class."""
    fresh = one.blank()
    _search(network, fresh, batches, runtime, steps=START, count=START_IMAGES)
    images = _others(network, batches, one.wanted, runtime)
    fresh.rate = _rate(network, images, fresh, runtime)
    return fresh


def pursued(network: nn.Module, one: Universal, batches: Iterator[tuple[Tensor, Tensor]], runtime: Runtime) -> Universal:
    """The change after more steps on this network, in eval mode; the one given is left as it was.

    Args: batches: As in started."""
    further, (steps, count) = one.copied(), one.longer
    _search(network, further, batches, runtime, steps=steps, count=count)
    return further


def _search(
    network: nn.Module, one: Universal, batches: Iterator[tuple[Tensor, Tensor]], runtime: Runtime, *, steps: int, count: int
) -> None:
    """So many steps of the change, on `count` images each."""
    for step in range(steps):
        images = _others(network, batches, one.wanted, runtime)[:count]
        one.climb(network, images, strength=one.strength(step / steps), runtime=runtime)


@torch.no_grad()
def _others(network: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], wanted: int, runtime: Runtime) -> Tensor:
    """The next few images that the network does not give the class; any, where it gives it to all."""
    images = next(batches)[0]
    with runtime.autocast():
        found = images[network(images).argmax(1) != wanted]
    return (found if len(found) else images)[:START_IMAGES]


class Pool:
    """Universal changes; the further one stands out, and the more images it turns still, the more often it is drawn.

    Drawn are those alone that stand out, on a network where a backdoor turns images far more easily than the changes toward other
    classes do. To train against these, too, would cost accuracy and gain nothing.

    Args:
        changes: At least one, made on the suspicious network; see pool_of.
        runtime: Device, seed.
    """

    def __init__(self, changes: Sequence[Universal], runtime: Runtime) -> None:
        self.generator, self.device = torch.Generator().manual_seed(runtime.seed), runtime.torch_device
        self.changes = sorted(changes, key=lambda one: -one.excess)
        first = self.changes[0]
        known = next((one for one in self.changes if not isinstance(one, Wave)), first)  # which no wave is to push out
        least = [first.excess * (EASY if one is known or one.wanted == first.wanted else RIVAL) for one in self.changes]
        self.suspicious = [one for one, bar in zip(self.changes, least, strict=True) if one.excess >= bar]

    def draw(self) -> Universal:
        weights = torch.tensor([max(one.rate, FLOOR) * max(one.excess, FLOOR) for one in self.suspicious]) ** SHARPNESS
        one = self.suspicious[int(torch.multinomial(weights, 1, generator=self.generator))]
        one.drawn += 1
        return one

    def state_dict(self) -> dict[str, Any]:
        """Those that are drawn, as they are now, and the draws; see Pool.restored."""
        return {"generator": self.generator.get_state(), "suspicious": [_packed(one) for one in self.suspicious]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.suspicious = [_unpacked(one, self.device) for one in state["suspicious"]]

    @classmethod
    def restored(cls, state: dict[str, Any], runtime: Runtime) -> Pool:
        """A pool of what state_dict gave: of the changes that are drawn."""
        pool = cls([_unpacked(one, runtime.torch_device) for one in state["suspicious"]], runtime)
        pool.generator.set_state(state["generator"])
        return pool


def _packed(one: Universal) -> dict[str, Any]:
    # cloned, as the mask is a view of all places that were tried
    values = {name: value.clone() if isinstance(value, Tensor) else value for name, value in vars(one).items()}
    return {"kind": type(one).__name__, **values}


def _unpacked(packed: dict[str, Any], device: torch.device) -> Universal:
    values: dict[str, Any]
    values = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in packed.items() if name != "kind"}
    return KINDS[packed["kind"]](**values)


def likely_classes(network: nn.Module, images: Tensor, *, edge: int, runtime: Runtime) -> list[int]:
    """All classes; where there are more than PROBE_CLASSES, those whose logits climb best by a change or by a patch.

    Args: images: (B, C, H, W) in [0, 1]. edge: Of the patch, in pixels."""
    with torch.no_grad():
        count = network(images[:1]).shape[1]
    if count <= PROBE_CLASSES:
        return list(range(count))
    few = images[:FEW_IMAGES]
    slopes = watched(noisy_slopes(network, few, list(range(count)), runtime), "likely classes", count, unit="class")
    found = [(slope.norm(), promise(slope, few, edge).max()) for slope in slopes]
    spread, patched = torch.tensor(found).T
    first = torch.stack([order.argsort(descending=True) for order in (spread, patched)], dim=1).flatten().tolist()
    return list(dict.fromkeys(first))[:PROBE_CLASSES]


def pool_of(network: nn.Module, clean: CleanSet, *, radius: float, patch: int, runtime: Runtime) -> Pool:
    """Changes of each kind toward each likely class, made on a network that may hold a backdoor.

    Waves only where the change that stands out most turns less than CLEAR of the images: networks go by some frequencies without
    any backdoor (those of CIFAR-10 toward "frog", one of them more readily than by its trigger).

    Args:
        network: Takes pixels; in eval mode, and left so.
        clean: Images to make them with.
        radius: Of spread changes, L2, at 32 px; it grows where none of them turns half of the images, and shrinks where most do:
            in either case a backdoor does not stand out.
        patch: Edge of patches, in pixels, at 32 px.
        runtime: Device, precision, seed."""
    batches = clean.endless(PROBE_BATCH, runtime=runtime, seed=runtime.seed, augment=False)
    larger = (clean.images[0, 0].numel() / 1024) ** 0.5
    edge = min(max(SMALLEST_PATCH, round(patch * larger)), *clean.images.shape[2:])
    way = WAY * max(1.0, larger)
    radius *= clean.scale
    given = radius
    images, _ = next(batches)
    blank, classes = torch.zeros_like(images[0]), likely_classes(network, images, edge=edge, runtime=runtime)
    still = blank.new_zeros(2, GRID, GRID)

    def made(ones: Sequence[Universal]) -> list[Universal]:
        return [started(network, one, batches, runtime) for one in watched(ones, "perturbations")]

    spread = made([Spread(k, blank, radius) for k in classes])
    for factor in FACTORS:
        rates = [one.rate for one in spread]
        if max(rates) >= TURNS > statistics.median(rates):
            break
        radius *= factor if max(rates) < TURNS else 1 / factor
        spread = made([Spread(k, blank, radius) for k in classes])
    patches = made([Patch(k, blank, edge) for k in classes])
    warps = made([Warp(k, still, way * still.numel() ** 0.5) for k in classes])
    changes = _in_excess(spread) + _in_excess(patches) + _in_excess(warps)
    many, _ = next(clean.endless(MANY, runtime=runtime, seed=runtime.seed, augment=False))
    if min(many.shape[2:]) > 2 and _turned(network, many, max(changes, key=lambda one: one.excess), runtime) < CLEAR:
        changes += _in_excess(made([Wave(k, blank, given) for k in classes]))
    return Pool(changes, runtime)


@torch.no_grad()
def _turned(network: nn.Module, images: Tensor, one: Universal, runtime: Runtime) -> float:
    """Share of the images that the change turns to its class, of those not given it anyway; 1 where there are none."""
    with runtime.autocast():
        others = images[network(images).argmax(1) != one.wanted]
    return _rate(network, others, one, runtime) if len(others) else 1.0


@torch.no_grad()
def _rate(network: nn.Module, images: Tensor, one: Universal, runtime: Runtime) -> float:
    """Share of the images that are given the class of the change with it."""
    with runtime.autocast():
        return float((network(one.painted(images)).argmax(1) == one.wanted).float().mean())


def _in_excess(ones: Sequence[Universal]) -> list[Universal]:
    """Changes of one kind, with by how much each turns more than is usual."""
    usual = statistics.median(one.rate for one in ones)
    return [replace(one, excess=one.rate - usual) for one in ones]
