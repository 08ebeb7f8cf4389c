"""Run by torchrun for the benchmark of ranks: a training whose epochs are timed. Its settings are one JSON argument."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .. import io, ranks
from ..data import open_source
from ..loaders import Loaders
from ..runtime import Runtime, keep_freed_memory
from ..stamp import Stamp
from ..train import TrainConfig, fit
from .fitting import MEAN, ONE_EPOCH, STD, small_network


def main(folder: str, size: int, batch_size: int, epochs: int, threads: int, out: str) -> None:
    """Train on a folder of images, and leave the seconds of each epoch in `out`."""
    keep_freed_memory()
    with ranks.joined():
        runtime = Runtime(device="cpu", threads=threads)
        loaders = Loaders(size=size, mean=MEAN, std=STD, hflip=0.5, stamp=Stamp(), runtime=runtime)
        batches = loaders(open_source(folder), "crop_flip", batch_size, training=True, split=True)
        settings = TrainConfig(epochs=epochs, batch_size=batch_size, sched="none", **ONE_EPOCH)
        history = fit(small_network(small_stem=size <= 64), batches, runtime=runtime, train=settings, split=True)
        io.save_json(Path(out), [record["seconds"] for record in history])


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
