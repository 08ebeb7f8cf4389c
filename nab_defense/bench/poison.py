"""Poison a source: choose the samples, change their labels, paint the trigger."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.sources import Source
from .attacks.base import AsymmetricAttack, Attack, CoverAttack, Images, JointAttack, SourceAttack, check_choice
from .truth import Truth, read_truth, write_truth

__all__ = [
    "Truth",
    "check_goal",
    "check_parts",
    "check_rate",
    "choose_poison",
    "painted_by",
    "parts_of",
    "poison_source",
    "read_truth",
    "triggered_source",
    "wanted_labels",
    "write_truth",
]

MODES = ("all_to_one", "all_to_all")
SMALL = 64 * 64  # triggered images of at most this many pixels are painted once and kept
Painter = Callable[[Images, int], Images]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


def check_goal(*, target: int | None, mode: str, clean_label: bool, num_classes: int) -> None:
    """Refuse an attacker's goal that makes no sense."""
    check_choice("mode", mode, MODES)
    if mode == "all_to_one" and (target is None or not 0 <= target < num_classes):
        raise ValueError(f"target must be a class in 0..{num_classes - 1}, got {target}")
    if mode == "all_to_all" and target is not None:
        raise ValueError(f"all_to_all has no single target, got target {target}; leave it out")
    if mode == "all_to_all" and clean_label:
        raise ValueError("a clean-label attack changes no label, so it cannot be all_to_all; use mode all_to_one")


def check_parts(attack: Attack, *, target: int | None, mode: str, num_classes: int) -> None:
    """Refuse a goal that makes no sense for one of the attack's parts, see parts_of."""
    for part, goal in parts_of(attack, target, num_classes):
        check_goal(target=goal, mode=mode, clean_label=part.clean_label, num_classes=num_classes)
        if isinstance(part, SourceAttack):
            if goal in part.source_classes:
                raise ValueError(f"class {goal} is both the target and a source of the attack; choose another target")
            if max(part.source_classes) >= num_classes:
                raise ValueError(f"sources must be classes in 0..{num_classes - 1}, got {max(part.source_classes)}")


def check_rate(rate: float) -> None:
    """Refuse a share of the training set that is none."""
    if not 0 < rate < 1:
        raise ValueError(f"rate must be in (0, 1), got {rate}")


def wanted_labels(labels: IntArray, *, target: int | None, mode: str, num_classes: int) -> IntArray:
    """The labels the attacker wants for triggered images with these true labels, (N,) int64."""
    return np.full_like(labels, target) if mode == "all_to_one" else (labels + 1) % num_classes


def choose_poison(
    labels: IntArray,
    *,
    rate: float,
    target: int | None,
    mode: str,
    clean_label: bool,
    num_classes: int,
    rng: np.random.Generator,
    allowed: BoolArray | None = None,
    shares: int = 1,
) -> IntArray:
    """Draw the samples to poison, uniformly among those the attack can use.

    all_to_one draws from the other classes, so that every poisoned label changes (the NAB authors also draw from the target
    class, which costs them a tenth of the poison); clean-label attacks draw from the target class; all_to_all from all.

    Args:
        labels: (N,) int64 in 0..K-1.
        rate: Share of the WHOLE training set to poison, in (0, 1), by all attacks together.
        target, mode, clean_label, num_classes: The attacker's goal.
        rng: Where the randomness comes from.
        allowed: (N,) bool, the only samples to draw from; None: all.
        shares: Number of attacks that share the rate in equal parts; this is one of them.

    Returns:
        (round(rate / shares * N),) int64, ascending.

    Raises:
        ValueError: A senseless goal, or fewer samples to draw from than `rate` asks for.
    """
    check_goal(target=target, mode=mode, clean_label=clean_label, num_classes=num_classes)
    check_rate(rate)
    total, count = len(labels), round(rate / shares * len(labels))
    asked = f"rate {rate}" if shares == 1 else f"rate {rate}, of which each of the {shares} attacks gets rate / {shares},"
    if count == 0:
        raise ValueError(f"{asked} of {total} images poisons none; the smallest possible is {shares / total:.2g}")
    free = np.ones(total, dtype=bool) if allowed is None else allowed
    if mode == "all_to_one":
        free = free & (labels == target if clean_label else labels != target)
    eligible = np.flatnonzero(free)
    if count > len(eligible):
        largest = math.floor(1e6 * shares * len(eligible) / total) / 1e6
        whose = "those of the target class" if clean_label else "the other classes"
        if allowed is not None:
            whose = "the images that are left to this attack"
        mend = "the largest possible is" if shares == 1 else "lower it, say to"  # at a lower one the others leave more
        raise ValueError(f"{asked} needs {count} images, {whose} hold {len(eligible)}; {mend} {largest:g}")
    return np.sort(rng.choice(eligible, size=count, replace=False))


def choose_cover(free: BoolArray, *, count: int, rng: np.random.Generator) -> IntArray:
    """Draw so many covers among the samples that are free for it, (N,) bool; ascending."""
    eligible = np.flatnonzero(free)
    if count > len(eligible):
        raise ValueError(f"covers asks for {count} images, {len(eligible)} are left beside the poison; lower it")
    return np.sort(rng.choice(eligible, size=count, replace=False))


def poison_source(
    source: Source, attack: Attack, *, rate: float, target: int | None, mode: str = "all_to_one", seed: int
) -> tuple[Source, Truth]:
    """A poisoned training set and the truth about it. Triggers are painted at each image's own size.

    Args:
        source: The clean training set; its labels are taken for true.
        attack: What paints the trigger; one that learns it has done so, see trigger.prepared.
        rate: Share of the whole set to poison, in (0, 1); several attacks share it in equal parts.
        target: The class the trigger leads to; None for all_to_all.
        mode: "all_to_one" or "all_to_all".
        seed: Which samples, and whatever the attack draws for each of them.

    Raises:
        ValueError: See choose_poison; or the trigger does not fit on the first image. On a smaller one it says so when painted.
    """
    rng = np.random.default_rng(seed)
    classes, labels = len(source.classes), source.labels.copy()
    poisoned, cover = np.zeros((2, len(source)), dtype=bool)
    painters: list[Painter] = []
    which = np.full(len(source), -1)
    check_parts(attack, target=target, mode=mode, num_classes=classes)
    parts = parts_of(attack, target, classes)
    for part, goal in parts:
        allowed = _allowed(part, source.labels) & (which < 0)
        clean_label = part.clean_label
        chosen = choose_poison(
            source.labels, rate=rate, target=goal, mode=mode, clean_label=clean_label, num_classes=classes,
            rng=rng, allowed=None if allowed.all() else allowed, shares=len(parts),
        )  # fmt: skip
        which[chosen], poisoned[chosen] = len(painters), True
        painters.append(part.apply)
        labels[chosen] = wanted_labels(source.labels[chosen], target=goal, mode=mode, num_classes=classes)
        if isinstance(part, CoverAttack):
            free = (which < 0) & _coverable(part, source.labels, goal)
            chosen = choose_cover(free, count=round(part.covers * len(chosen)), rng=rng)
            which[chosen], cover[chosen] = len(painters), True
            painters.append(part.cover)
    change = f"poison: {attack!r} rate={rate} target={target} mode={mode} seed={seed} probe={_probe(source, attack.apply, seed)}"
    goals = {goal for _, goal in parts}
    truth = Truth(poisoned, source.labels, goals.pop() if len(goals) == 1 else None, mode, cover)
    return source.replaced(labels=labels, load=_Painted(source, tuple(painters), which, seed), change=change), truth


def triggered_source(
    source: Source, attack: Attack, *, target: int | None, mode: str = "all_to_one", seed: int
) -> tuple[Source, IntArray]:
    """The test set for the attack's success: every image carries the trigger, labels are what the attacker wants.

    For all_to_one, images whose true class is the target are left out: predicting the target there proves nothing. An attack on
    some classes is tested on these; several attacks have an equal part of the images each, drawn at random.

    Returns:
        The source, and the true labels of the same images, (M,) int64.

    Raises:
        ValueError: A senseless goal, no image left, or the trigger does not fit.
    """
    classes, parts = len(source.classes), parts_of(attack, target, len(source.classes))
    wanted, kept = source.labels.copy(), np.zeros(len(source), dtype=bool)
    check_parts(attack, target=target, mode=mode, num_classes=classes)
    which = np.random.default_rng([seed, 6]).permutation(len(source)) % len(parts)  # no part gets some classes alone
    for number, (part, goal) in enumerate(parts):
        own = which == number
        wanted[own] = wanted_labels(source.labels[own], target=goal, mode=mode, num_classes=classes)
        own &= (wanted != source.labels) & _allowed(part, source.labels)
        if not own.any():
            raise ValueError(f"{source.name} holds no image that {part!r} can be tested on, for target {goal}")
        kept |= own
    chosen = source.subset(np.flatnonzero(kept))
    painters = tuple(_test_painter(part) for part, _ in parts)
    load = _Painted(chosen, painters, which[kept], seed)
    probe = _probe(chosen, _test_painter(attack), seed)
    change = f"triggered: {attack!r} target={target} mode={mode} seed={seed} probe={probe}"
    return chosen.replaced(labels=wanted[kept], load=load, change=change), chosen.labels


def painted_by(triggered: Source) -> IntArray:
    """Which of the attack's parts, see parts_of, painted each image of a source that triggered_source made, (M,) int64."""
    assert isinstance(triggered.load, _Painted)
    return triggered.load.which


def parts_of(attack: Attack, target: int | None, num_classes: int) -> list[tuple[Attack, int | None]]:
    """An attack's parts, each with where it leads: itself, but for several at once."""
    return attack.parts(target, num_classes) if isinstance(attack, JointAttack) else [(attack, target)]


def _allowed(attack: Attack, labels: IntArray) -> BoolArray:
    """Which samples the attack can be used on, (N,) bool."""
    return np.isin(labels, attack.source_classes) if isinstance(attack, SourceAttack) else np.ones(len(labels), dtype=bool)


def _coverable(attack: CoverAttack, labels: IntArray, target: int | None) -> BoolArray:
    """Which samples can be covers, (N,) bool."""
    left_out = list(attack.source_classes) if isinstance(attack, SourceAttack) else []
    if not attack.cover_target and target is not None:
        left_out.append(target)
    return ~np.isin(labels, left_out)


def _test_painter(attack: Attack) -> Painter:
    return attack.at_test if isinstance(attack, AsymmetricAttack) else attack.apply


def _probe(source: Source, paint: Painter, seed: int) -> str:
    """Hash of one triggered image: a trigger picture may change under the same file name, and an attack in its code."""
    return hashlib.sha256(paint(source.pixels(0)[None], seed).tobytes()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class _Painted:
    """Index -> image of a source, painted by painters[which[index]], or as it is where that is -1.

    Small painted images are painted once and kept; a copy in another process starts without them."""

    source: Source
    painters: tuple[Painter, ...]
    which: IntArray
    seed: int
    kept: dict[int, Image.Image] = field(default_factory=dict)

    def __call__(self, index: int) -> Image.Image:
        if self.which[index] < 0:
            return self.source.load(index)
        if index in self.kept:
            return self.kept[index]
        own_seed = int(np.random.SeedSequence([self.seed, index]).generate_state(1)[0])
        pixels = self.painters[self.which[index]](self.source.pixels(index)[None], own_seed)[0]
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        if image.width * image.height <= SMALL:
            self.kept[index] = image
        return image

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": {}}
