"""How the cells of a grid are spread: whole settings over the processes of torchrun, or over a Ray cluster."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .cells import Cell, Setting, grouped
from .run import FAILED, Record, Runner, as_record, records

__all__ = ["on_ray", "own_share"]

TOLD = ("NAB_CACHE", "HF_HUB_OFFLINE", "HF_HOME", "NO_ALBUMENTATIONS_UPDATE")  # of this process's environment, to workers


def own_share(cells: list[Cell]) -> list[Cell]:
    """This process's part where torchrun started several: whole settings in turn, so that no two train one undefended twin."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    return [cell for group in grouped(cells)[rank::world] for cell in group]


def on_ray(workers: int | None = None) -> Runner:
    """A runner for `run_cells` that has the workers of a Ray cluster run whole settings, each with `runtime.threads` processors
    (1 where the recipe names none), and with a GPU where the cluster has any and the recipe does not name the CPU.

    Finished cells come back to this process, which writes them down. The workers must find the data under the same path; twins
    and sheets stay where they were made, so a machine that shares no disk trains twins of its own. A worker that dies fails the
    rest of its setting, which the next run tries again.

    Args: workers: How many to start on this machine; None: those of the cluster that Ray finds (RAY_ADDRESS, or one that
        `ray start` started here), or as many as this machine has processors for.

    Raises:
        ValueError: Ray is not installed, its cluster does not answer, or has no machine with so many processors."""
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise ValueError("--launcher ray needs Ray; pip install ray, or this package with its extra [ray]") from None

    def run(cells: list[Cell], out: Path) -> Iterator[tuple[Cell, Record]]:
        if not cells:
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report home
        most = max((_processors(cell.setting) for cell in cells), default=1)
        own = {} if workers is None else {"address": "local", "num_cpus": workers * most}
        told = {name: value for name, value in os.environ.items() if name in TOLD}
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", runtime_env={"env_vars": told}, **own)
        except ConnectionError as error:
            raise ValueError(f"Ray's cluster does not answer, see RAY_ADDRESS: {' '.join(str(error).split())}") from None
        try:
            largest = max(node["Resources"].get("CPU", 0) for node in ray.nodes())
            if most > largest:
                raise ValueError(f"runtime.threads={most}, but no machine gives Ray more than {largest:g} processors; lower it")
            yield from _gathered(ray, cells, out)
        finally:
            ray.shutdown()

    return run


def _gathered(ray: Any, cells: list[Cell], out: Path) -> Iterator[tuple[Cell, Record]]:
    """The cells as the workers finish them."""
    work = ray.remote(max_retries=0)(_in_worker)
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    left = {}
    for group in grouped(cells):
        setting = group[0].setting
        gpus = int(has_gpus and setting.recipe.runtime.device != "cpu")
        task = work.options(num_cpus=_processors(setting), num_gpus=gpus).remote(group, str(out.absolute()), str(Path.cwd()))
        left[task] = group
    while left:
        (task, *_), _ = ray.wait(list(left), num_returns=1)
        try:
            record = ray.get(next(task))
        except StopIteration:
            del left[task]
        except ray.exceptions.RayTaskError:
            raise  # what no cell's record can tell, such as a package that the worker lacks
        except ray.exceptions.RayError as error:
            for cell in left.pop(task):
                died = {"status": FAILED, "error": f"its worker died, {type(error).__name__}", "fault": True}
                yield cell, as_record(cell, died, 0.0)
        else:
            cell, *left[task] = left[task]
            yield cell, record


def _processors(setting: Setting) -> int:
    return setting.recipe.runtime.threads or 1


def _in_worker(cells: list[Cell], out: str, folder: str) -> Iterator[Record]:
    """The records of one setting's cells, made in a worker, which starts in a folder of Ray's."""
    os.chdir(folder)
    for _, record in records(cells, Path(out)):
        yield record
