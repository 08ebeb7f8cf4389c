"""What a scan and a repair cost, in epochs of ordinary training of the same network on the same images."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from ..data import Source, open_source
from ..detectors import detectors
from ..detectors.lga import lga_loss
from ..loaders import Loaders
from ..purify import purifiers
from ..purify.run import purify as repair
from ..repair import read_clean
from ..runtime import Runtime
from ..scan import EarlyScan, Scan
from ..select import expand
from ..stamp import Stamp
from ..train import TrainConfig, fit
from .fitting import MEAN, ONE_EPOCH, STD, image_folder, small_network
from .timing import seconds, side_by_side

__all__ = ["purify", "scan"]

DIGITS: dict[str, Any] = {"mean": (0.306,), "std": (0.376,)}


def scan(*, count: int = 2048, size: int = 32, batch_size: int = 128, fraction: float = 0.05, repeats: int = 3) -> dict[str, Any]:
    """One epoch of a scan (training without augmentation, the ordered pass, ranking, expanding) over a plain one, augmented."""
    runtime = Runtime(device="cpu")
    detector = detectors.create("lga")
    with image_folder(count, size) as folder:
        source = open_source(str(folder))
        loaders = Loaders(size=size, mean=MEAN, std=STD, hflip=0.5, stamp=Stamp(), runtime=runtime)
        ordered = loaders(source, "none", 512, training=False)
        bare = loaders(source, "none", batch_size, training=True)
        augmented = loaders(source, "crop_flip", batch_size, training=True)

        def look(seen: Scan) -> bool:
            expand(detector.detect(seen), seen, fraction=fraction)
            return True

        network = small_network()
        passes = EarlyScan(ordered, source.labels, look=look, runtime=runtime, fingerprint=source.fingerprint)
        one = TrainConfig(epochs=1, batch_size=batch_size, sched="none", **ONE_EPOCH)
        whole = partial(fit, network, bare, runtime=runtime, train=one, loss=lga_loss(0.5, "flooding"), after_epoch=passes)
        plain = partial(fit, small_network(), augmented, runtime=runtime, train=one)
        found = side_by_side(("scan", whole), ("plain", plain), repeats=repeats)
        assert passes.last is not None  # the scan has run
        looking = [seconds(partial(look, passes.last)) for _ in range(repeats)]
    settings = {"images": count, "size": size, "batch_size": batch_size, "fraction": fraction, "repeats": repeats}
    return {"what": "seconds of one epoch", "settings": settings, "epoch": found, "look_seconds": looking}


def purify(*, epochs: int = 20, clean_limit: int = 400, methods: Sequence[str] = (), **knobs: Any) -> dict[str, Any]:
    """Each purifier's seconds, and those of judging its candidates, over one epoch of training the same network on digits.

    Args:
        epochs: Of training the network that is repaired, which holds no backdoor.
        clean_limit: Images the purifiers get.
        methods: Names of purifiers; none: all, with their defaults.
        knobs: Settings that all of them take."""
    runtime, source = Runtime(device="cpu"), open_source("digits")
    network, epoch_seconds = _trained(source, epochs, runtime)
    _, clean = read_clean(source, size=8, limit=clean_limit, labelled=True, hflip=0.0, seed=0)
    found: dict[str, Any] = {}
    for name in methods or purifiers.names():
        method = purifiers.create(name, **knobs)
        result = repair(copy.deepcopy(network), clean, method, **DIGITS, runtime=runtime)
        found[name] = {"seconds": result.seconds, "epochs": {part: s / epoch_seconds for part, s in result.seconds.items()}}
    settings = {"epochs": epochs, "clean_limit": clean_limit, "images": len(source)}
    return {"what": "seconds, and epochs of training", "settings": settings, "epoch_seconds": epoch_seconds, "methods": found}


def _trained(source: Source, epochs: int, runtime: Runtime) -> tuple[nn.Module, float]:
    """A network, and the median seconds of its epochs."""
    loaders = Loaders(size=8, hflip=0.0, stamp=Stamp(), runtime=runtime, **DIGITS)
    network = small_network(channels=1)
    train = TrainConfig(epochs=epochs, batch_size=64, lr=0.05)
    history = fit(network, loaders(source, "crop_flip", 64, training=True), runtime=runtime, train=train)
    return network, float(np.median([record["seconds"] for record in history]))
