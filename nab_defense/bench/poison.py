"""Poison a source: choose the samples, change their labels, paint the trigger."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.sources import Source
from .attacks.base import Attack, CoverAttack, check_choice
from .truth import Truth, read_truth, write_truth

__all__ = ["Truth", "choose_poison", "poison_source", "read_truth", "triggered_source", "wanted_labels", "write_truth"]

MODES = ("all_to_one", "all_to_all")
SMALL = 64 * 64  # triggered images of at most this many pixels are painted once and kept
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
) -> IntArray:
    """Draw the samples to poison, uniformly among those the attack can use.

    all_to_one draws from the other classes, so that every poisoned label changes (the NAB authors also draw from the target
    class, which costs them a tenth of the poison); clean-label attacks draw from the target class; all_to_all from all.

    Args:
        labels: (N,) int64 in 0..K-1.
        rate: Share of the WHOLE training set to poison, in (0, 1).
        target, mode, clean_label, num_classes: The attacker's goal.
        rng: Where the randomness comes from.

    Returns:
        (round(rate * N),) int64, ascending.

    Raises:
        ValueError: A senseless goal, or fewer samples to draw from than `rate` asks for.
    """
    check_goal(target=target, mode=mode, clean_label=clean_label, num_classes=num_classes)
    if not 0 < rate < 1:
        raise ValueError(f"rate must be in (0, 1), got {rate}")
    total, count = len(labels), round(rate * len(labels))
    if count == 0:
        raise ValueError(f"rate {rate} of {total} images poisons none; the smallest possible is {1 / total:.2g}")
    if mode == "all_to_all":
        eligible = np.arange(total)
    else:
        eligible = np.flatnonzero(labels == target if clean_label else labels != target)
    if count > len(eligible):
        largest = math.floor(1e6 * len(eligible) / total) / 1e6
        whose = "those of the target class" if clean_label else "the other classes"
        raise ValueError(f"rate {rate} needs {count} images, {whose} hold {len(eligible)}; the largest possible is {largest:g}")
    return np.sort(rng.choice(eligible, size=count, replace=False))


def choose_cover(poisoned: BoolArray, *, fraction: float, rng: np.random.Generator) -> IntArray:
    """Draw round(fraction * N) covers among the samples that are not poisoned, ascending."""
    free, count = np.flatnonzero(~poisoned), round(fraction * len(poisoned))
    if count > len(free):
        raise ValueError(f"cover_fraction {fraction} needs {count} images, {len(free)} are left beside the poison; lower it")
    return np.sort(rng.choice(free, size=count, replace=False))


def poison_source(
    source: Source, attack: Attack, *, rate: float, target: int | None, mode: str = "all_to_one", seed: int
) -> tuple[Source, Truth]:
    """A poisoned training set and the truth about it. Triggers are painted at each image's own size.

    Args:
        source: The clean training set; its labels are taken for true.
        attack: What paints the trigger.
        rate: Share of the whole set to poison, in (0, 1).
        target: The class the trigger leads to; None for all_to_all.
        mode: "all_to_one" or "all_to_all".
        seed: Which samples, and whatever the attack draws for each of them.

    Raises:
        ValueError: See choose_poison; or the trigger does not fit.
    """
    rng = np.random.default_rng(seed)
    classes, clean_label = len(source.classes), attack.clean_label
    chosen = choose_poison(
        source.labels, rate=rate, target=target, mode=mode, clean_label=clean_label, num_classes=classes, rng=rng
    )
    poisoned, cover = np.zeros((2, len(source)), dtype=bool)
    poisoned[chosen] = True
    if isinstance(attack, CoverAttack):
        cover[choose_cover(poisoned, fraction=attack.cover_fraction, rng=rng)] = True
    labels = np.where(poisoned, wanted_labels(source.labels, target=target, mode=mode, num_classes=classes), source.labels)
    change = f"poison: {attack!r} rate={rate} target={target} mode={mode} seed={seed} probe={_probe(source, attack, seed)}"
    load = _Painted(source, attack, poisoned, cover, seed)
    return source.replaced(labels=labels, load=load, change=change), Truth(poisoned, source.labels, target, mode, cover)


def triggered_source(
    source: Source, attack: Attack, *, target: int | None, mode: str = "all_to_one", seed: int
) -> tuple[Source, IntArray]:
    """The test set for the attack's success: every image carries the trigger, labels are what the attacker wants.

    For all_to_one, images whose true class is the target are left out: predicting the target there proves nothing.

    Returns:
        The source, and the true labels of the same images, (M,) int64.

    Raises:
        ValueError: A senseless goal, no image left, or the trigger does not fit.
    """
    classes = len(source.classes)
    check_goal(target=target, mode=mode, clean_label=attack.clean_label, num_classes=classes)
    kept = np.arange(len(source)) if mode == "all_to_all" else np.flatnonzero(source.labels != target)
    if len(kept) == 0:
        raise ValueError(f"{source.name} holds only images of the target class {target}; nothing is left to attack")
    chosen = source.subset(kept)
    load = _Painted(chosen, attack, np.ones(len(kept), dtype=bool), np.zeros(len(kept), dtype=bool), seed)
    change = f"triggered: {attack!r} target={target} mode={mode} seed={seed} probe={_probe(chosen, attack, seed)}"
    labels = wanted_labels(chosen.labels, target=target, mode=mode, num_classes=classes)
    return chosen.replaced(labels=labels, load=load, change=change), chosen.labels


def _probe(source: Source, attack: Attack, seed: int) -> str:
    """Hash of one triggered image: a trigger picture may change under the same file name, and an attack in its code."""
    return hashlib.sha256(attack.apply(source.pixels(0)[None], seed).tobytes()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class _Painted:
    """Index -> image of a source, with the attack's trigger where the sample is poisoned or a cover.

    Small triggered images are painted once and kept; a copy in another process starts without them."""

    source: Source
    attack: Attack
    poisoned: BoolArray
    cover: BoolArray
    seed: int
    kept: dict[int, Image.Image] = field(default_factory=dict)

    def __call__(self, index: int) -> Image.Image:
        if not (self.poisoned[index] or self.cover[index]):
            return self.source.load(index)
        if index in self.kept:
            return self.kept[index]
        own_seed = int(np.random.SeedSequence([self.seed, index]).generate_state(1)[0])
        paint = self.attack.cover if self.cover[index] and isinstance(self.attack, CoverAttack) else self.attack.apply
        pixels = paint(self.source.pixels(index)[None], own_seed)[0]
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        if image.width * image.height <= SMALL:
            self.kept[index] = image
        return image

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": {}}
