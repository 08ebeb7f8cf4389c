"""Triggers that are learned: taught once from the data to poison, kept by content, saved beside what was poisoned with them."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
from PIL import Image

from .. import ranks
from ..data.sources import Source
from ..io import cache_folder, load_tensors, save_tensors
from ..runtime import Runtime
from .attacker import exact
from .attacks.base import Attack, Images, LearnedAttack, Lesson
from .poison import check_parts, parts_of

__all__ = ["load_trigger", "prepared", "save_trigger", "warn_if_shrunk"]

log = logging.getLogger(__name__)
CODE = Path(__file__).parent
LARGEST = 5000  # images that an attacker learns from, so that one core is done in about a minute
ENOUGH = 100  # of these, at least, of a class whose images are poisoned as they are labelled, where there are as many
EDGE = 32  # pixels; larger images are shrunk to it for learning, and the trigger is enlarged


def prepared(attack: Attack, source: Source, *, target: int | None, seed: int, runtime: Runtime | None = None) -> Attack:
    """The attack, ready to paint. One that learns its trigger learns it from the source, unless the same was learned before.

    What was learned lies in the folder NAB_CACHE, by default ~/.cache/nab_defense, under a hash of the data, the attack, its
    settings, target, seed and code: all runs on one machine that poison alike use the same trigger, in training and test.

    Args:
        attack: Any; those that learn nothing are given back as they are.
        source: The clean training set.
        target: Where the trigger leads; None for all_to_all.
        seed: Seed of the learning.
        runtime: Where to learn; None: the default one.

    Raises:
        ValueError: The attack cannot learn from these images or for this target."""
    if not isinstance(attack, LearnedAttack):
        return attack
    mode, classes = "all_to_all" if target is None else "all_to_one", len(source.classes)
    check_parts(attack, target=target, mode=mode, num_classes=classes)
    runtime = runtime or Runtime()
    parts = [source.fingerprint, repr(attack), str(target), str(seed), runtime.torch_device.type, _code()]
    cached = cache_folder("triggers") / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.safetensors"

    def learned() -> bool:
        if cached.exists():
            return True
        log.info("%s learns its trigger", type(attack).__name__)
        goals = [goal for part, goal in parts_of(attack, target, classes) if part.clean_label]
        lesson = _lesson(source, goals, target=target, seed=seed, runtime=runtime)
        with exact(slopes=True):
            tensors = attack.learn(lesson)
        for name, values in tensors.items():
            if not values.isfinite().all():
                raise ValueError(
                    f"{type(attack).__name__} learned a {name} that is not finite; give other images or another seed"
                )
        if tensors:
            save_tensors(cached, tensors, {})
        return bool(tensors)

    return attack.taught(load_tensors(cached)[0] if ranks.on_first(learned) else {})


def save_trigger(path: Path, attack: Attack | None, *, target: int | None) -> bool:
    """Write what the attack has learned; False, and no file is left there, where that is nothing."""
    tensors = getattr(attack, "tensors", {})
    if tensors:
        save_tensors(path, tensors, {"attack": repr(attack), "target": target})
    else:
        path.unlink(missing_ok=True)
    return bool(tensors)


def load_trigger(path: Path, attack: Attack, *, target: int | None) -> Attack:
    """The attack with the trigger in a file that save_trigger wrote.

    Raises:
        ValueError: No such file, the attack learns nothing, or the file is of another attack, other settings or target."""
    if not isinstance(attack, LearnedAttack):
        raise ValueError(f"{attack!r} learns no trigger, so there is none to read from {path}; leave the file out")
    tensors, header = load_tensors(path)
    if "attack" not in header:
        raise ValueError(f"{path} is not a trigger of this package")
    for what, theirs, ours in (("attack", header["attack"], repr(attack)), ("target", header["target"], target)):
        if theirs != ours:
            raise ValueError(
                f"{path} holds a trigger of {what} {theirs}, and {ours} is asked for; give the settings it was made with"
            )
    return attack.taught(tensors)


def warn_if_shrunk(attack: Attack, source: Source, size: int) -> None:
    """Say so where shrinking the painted images of the source to the network's input, size x size, wipes the trigger out."""
    for part, _ in parts_of(attack, None, len(source.classes)):
        painter = getattr(part, "painter", part)
        if getattr(painter, "fine", False) and (edge := source.edge()) > size:
            log.warning(
                "%s paints %s at %d px and the network is shown %d px, so that little of the trigger is left; shrink the images "
                "first, or raise data.size",
                type(painter).__name__, source.name, edge, size,
            )  # fmt: skip


def _lesson(source: Source, goals: list[int | None], *, target: int | None, seed: int, runtime: Runtime) -> Lesson:
    """A random part of the source, of one size. Images that are not square are squeezed, and so are their triggers later.

    Args: goals: Classes whose own images a part of the attack changes, and so must know; of many classes the part has few."""
    part = source.limited(LARGEST, seed)
    chosen = np.isin(source.ids, part.ids)
    for goal in goals:
        rows = np.flatnonzero(~chosen & (source.labels == goal))
        chosen[rows[: max(0, ENOUGH - np.count_nonzero(part.labels == goal))]] = True
    part = source.subset(np.flatnonzero(chosen))
    edge = min(EDGE, part.edge())
    images = np.stack([_square(part.image(index), edge) for index in range(len(part))])
    return Lesson(images, part.labels, len(source.classes), target, seed, runtime)


def _square(image: Image.Image, edge: int) -> Images:
    if image.size != (edge, edge):
        image = image.resize((edge, edge), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _code() -> str:
    """Hash of the code that learns: a better attack must not find the trigger of the one before it."""
    files = [CODE / "attacker.py", Path(__file__), *sorted((CODE / "attacks").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
