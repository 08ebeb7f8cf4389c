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


def own_share(cells: list[Cell]) -> list[Cell]:
    """This process's part where torchrun started several: whole settings in turn, so that no two train the same twin."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    return [cell for group in grouped(cells)[rank::world] for cell in group]


def on_ray(workers: int | None = None) -> Runner:
    """A runner for `run_cells` that has Ray's workers run whole settings, each with `runtime.threads` processors (1 where the recipe
    names none) and with a GPU where the cluster has any and the recipe does not name the CPU.

    Finished cells come back to this process, which writes them down. The workers must find the data under the same path; sheets and
    twins stay where they were made, so nodes that share no disk train the twins that they miss anew. A worker that dies fails the
    rest of its setting, which the next run tries again.

    Args: workers: Processors to give to workers of this machine; None: those of the cluster that Ray finds (RAY_ADDRESS, or one that
        `ray start` started here), or all of this machine's.

    Raises:
        ValueError: Ray is not installed, or its cluster does not answer."""
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise ValueError("--launcher ray needs Ray; pip install 'nab_defense[ray]'") from None

    def run(cells: list[Cell], out: Path) -> Iterator[tuple[Cell, Record]]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report home
        own = {} if workers is None else {"address": "local", "num_cpus": workers}
        try:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning", **own)
        except ConnectionError as error:
            raise ValueError(f"Ray's cluster does not answer: {' '.join(str(error).split())}; see RAY_ADDRESS") from None
        try:
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
        task = work.options(**_needs(group[0].setting, has_gpus)).remote(group, str(out.absolute()), str(Path.cwd()))
        left[task] = group
    while left:
        (task, *_), _ = ray.wait(list(left), num_returns=1)
        try:
            record = ray.get(next(task))
        except StopIteration:
            del left[task]
        except ray.exceptions.RayTaskError:
            raise  # a fault of the program, as without Ray
        except ray.exceptions.RayError as error:
            for cell in left.pop(task):
                yield cell, as_record(cell, {"status": FAILED, "error": f"its worker died, {type(error).__name__}"}, 0.0)
        else:
            cell, *left[task] = left[task]
            yield cell, record


def _needs(setting: Setting, has_gpus: bool) -> dict[str, float]:
    runtime = setting.recipe.runtime
    return {"num_cpus": runtime.threads or 1, "num_gpus": int(has_gpus and runtime.device != "cpu")}


def _in_worker(cells: list[Cell], out: str, folder: str) -> Iterator[Record]:
    """The records of one setting's cells, made in a worker, which starts in a folder of Ray's."""
    os.chdir(folder)
    for _, record in records(cells, Path(out)):
        yield record
