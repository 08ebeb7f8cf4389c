"""Whole runs beside plain training, scans of ten times the data, and training by two processes beside one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import io
from ..look import look
from ..pipeline import run, train
from ..plan import Finding
from ..recipe import parse_recipe
from ..schema import Recipe
from ..session import Session
from ..types import NABPlan
from .fitting import MEAN, SMALL_NETWORK, STD, image_folder
from .timing import peak_memory, process_peak, side_by_side, spread

__all__ = ["ranks", "scan_growth", "whole"]

PACKAGE = Path(__file__).parents[1]
WAYS = {"one_thread": (1, 1), "two_threads": (1, 2), "two_ranks": (2, 1)}  # processes, and threads of each


@contextmanager
def poisoned(count: int, size: int, *, epochs: int, scan_epochs: int, batch_size: int) -> Iterator[tuple[Recipe, Path]]:
    """A recipe for Blend at 10 % on a folder of images, scanned by a smaller network as in recipes/cifar10_cpu.yaml; and a
    folder for its runs."""
    with image_folder(count, size) as images, tempfile.TemporaryDirectory() as out:
        tree = {
            "data": {"source": str(images), "size": size, "mean": list(MEAN), "std": list(STD)},
            "attack": {"name": "blend", "rate": 0.1, "params": {"alpha": 0.3}},
            "model": {"name": "resnet10t", "small_stem": True, "kwargs": SMALL_NETWORK},
            "scan": {"epochs": scan_epochs, "model": {"name": "resnet10t", "kwargs": SMALL_NETWORK}},
            "train": {"epochs": epochs, "batch_size": batch_size, "augment": "crop_flip"},
        }
        yield parse_recipe({"name": "speed", **tree}, (), "speed"), Path(out)


def whole(
    *, count: int = 2000, size: int = 32, epochs: int = 10, scan_epochs: int = 5, batch_size: int = 128, repeats: int = 2
) -> dict[str, Any]:
    """A defended run (scan, training, second look, check) over plain training of the same network for the same epochs."""
    knobs = {"epochs": epochs, "scan_epochs": scan_epochs, "batch_size": batch_size}
    left: dict[str, Any] = {}
    with poisoned(count, size, **knobs) as (recipe, out):

        def defended() -> None:
            left.update(run(recipe, out / "defended"))

        def plain() -> None:
            session = Session(recipe, out / "plain", resume=False)
            train(session, NABPlan.empty(session.source.labels), "plain")

        found = side_by_side(("defended", defended), ("plain", plain), repeats=repeats, warm=False)
    told = {"stages": left["seconds"], "detection": {key: left["detection"][key] for key in ("precision", "recall")}}
    return {
        "what": "seconds of a run",
        "settings": {"images": count, "size": size, **knobs, "repeats": repeats},
        "run": found,
        **told,
    }


def scan_growth(*, count: int = 2000, factor: int = 10, size: int = 16, epochs: int = 4, batch_size: int = 64) -> dict[str, Any]:
    """A whole scan, from images to a plan, of so many images and of `factor` times as many: seconds, and the peak of memory above
    the images, which are held in it: of the whole process, and of what the scan added. The files are read before."""
    knobs, runs = {"epochs": 1, "scan_epochs": epochs, "batch_size": batch_size}, []
    for images in (count, count, factor * count):  # the first, for what is loaded or made but once, counts for nothing
        with poisoned(images, size, **knobs) as (recipe, out):
            session = Session(recipe, out, resume=False)
            held = len(session.source) * 3 * size**2 / 2**20
            found: list[Finding] = []
            taken, peak = peak_memory(partial(_looked, session, found))
        one = {"images": images, "suspects": int(found[0].plan.suspect.sum()), "seconds": taken}
        runs.append({**one, "images_mb": held, "process_mb": process_peak() - held, "added_mb": peak - held})
    growth = {name: runs[2][name] / runs[1][name] for name in ("seconds", "process_mb", "added_mb")}
    settings = {"images": count, "factor": factor, "size": size, **knobs}
    return {"what": "seconds and MB of a scan", "settings": settings, "runs": runs[1:], "times": growth}


def _looked(session: Session, found: list[Finding]) -> None:
    found.append(look(session)[0])


def ranks(*, count: int = 2048, epochs: int = 4, size: int = 32, batch_size: int = 128, repeats: int = 2) -> dict[str, Any]:
    """Epochs of training by one process with one thread and with two, over those by two processes of torchrun with one each.

    What is told of each start is the median of its epochs after the first."""
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    with image_folder(count, size) as folder:
        told = {"folder": str(folder), "size": size, "batch_size": batch_size, "epochs": epochs}
        for turn in range(repeats):
            for name in list(WAYS)[:: 1 if turn % 2 == 0 else -1]:
                taken[name].append(float(np.median(_epochs(told, *WAYS[name])[1:])))
    found = {}
    for name in ("one_thread", "two_threads"):
        ratios = [one / two for one, two in zip(taken[name], taken["two_ranks"], strict=True)]
        found[name] = {"of": f"{name} / two_ranks", "ratio": spread(ratios)}
    settings = {"images": count, "size": size, "batch_size": batch_size, "epochs": epochs, "repeats": repeats}
    return {"what": "seconds of one epoch: above 1 two ranks are faster", "settings": settings, "seconds": taken, **found}


def _epochs(told: dict[str, Any], processes: int, threads: int) -> list[float]:
    """Seconds of each epoch of a training that torchrun starts; see epochs.py.

    Raises:
        ValueError: It failed."""
    with tempfile.TemporaryDirectory() as out:
        path = Path(out) / "seconds.json"
        told = {**told, "threads": threads, "out": str(path)}
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        places = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": str(threads)}
        command = [*launch, "-m", f"{PACKAGE.name}.speed.epochs", json.dumps(told)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if "Error: " in line]
            raise ValueError(f"training by {processes} processes failed: {(said or [done.stderr])[0].strip()[-300:]}")
        seconds: list[float] = io.load_json(path)
        return seconds
