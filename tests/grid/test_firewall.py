"""No defence is handed truth, test images or the attack: a spy looks at everything that it can reach."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nab_defense.bench.truth import Truth
from nab_defense.data import Source
from nab_defense.defences import Outcome, Task, defences
from nab_defense.grid import cells_of, load_grid, run_cells
from nab_defense.grid.case import Case
from nab_defense.grid.given import Pictures, split_off
from nab_defense.schema import Attack, Recipe
from nab_defense.types import NABPlan
from tests.grid.small import RECIPE, small_grid

ATTACK = "adap_blend"
SEEN: list[Task] = []


@defences.register("spy")
@dataclass(frozen=True)
class Spy:
    def defend(self, task: Task) -> Outcome:
        SEEN.append(task)
        return Outcome(task.undefended, {"train": task.plain_seconds}, NABPlan.empty(task.source.labels))


def inside(value: Any, path: str = "task", known: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Everything that can be reached from a value: fields, items, keys, what functions close over, owners of methods."""
    known = set() if known is None else known
    if id(value) in known or isinstance(value, (type, types.ModuleType)):
        return
    known.add(id(value))
    yield path, value
    parts: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        parts += [(f"[{key!r}]", item) for key, item in value.items()] + [(".key", key) for key in value]
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts += [(f"[{index}]", item) for index, item in enumerate(value)]
    elif isinstance(value, types.FunctionType):
        parts += [(".closure", cell.cell_contents) for cell in value.__closure__ or ()]
        parts += [(".default", item) for item in value.__defaults__ or ()]
    elif isinstance(value, partial):
        parts += [(".func", value.func), (".args", value.args), (".keywords", value.keywords)]
    elif isinstance(value, types.MethodType):
        parts += [(".self", value.__self__)]
    if isinstance(getattr(value, "__dict__", None), dict):
        parts += [(f".{name}", item) for name, item in vars(value).items()]
    for name, part in parts:
        yield from inside(part, path + name, known)


def secrets(task: Any, case: Case) -> list[str]:
    """Where something lies that no defence may know."""
    truth, oracle = case.truth, case.twins.oracle.state_dict()
    told = [truth.poisoned, truth.cover, truth.poisoned | truth.cover]
    told += [~mask for mask in told]
    masks = [truth.true_labels, *told, *map(np.flatnonzero, told)]
    tests = {case.session.test_source.pixels(i).tobytes() for i in range(len(case.session.test_source))}
    shades = {shade(case.session.test_source.pixels(i)) for i in range(len(case.session.test_source))}
    found = []
    for path, value in inside(task):
        module = type(value).__module__
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().numpy()
        elif isinstance(value, Image.Image):
            value = np.asarray(value)
        elif (
            isinstance(value, (list, tuple, set, frozenset))
            and value
            and all(isinstance(one, (int, np.integer)) for one in value)
        ):
            value = np.sort(list(value))
        if isinstance(value, (Truth, Attack, Case)) or module.startswith(("nab_defense.bench", "nab_defense.grid.case")):
            found.append(f"{path} is a {type(value).__name__}")
        elif isinstance(value, Recipe) and (value.attack or value.data.test or value.data.truth or value.data.source != "given"):
            found.append(f"{path} names the attack, the test set or the source")
        elif isinstance(value, (str, PurePath)) and ATTACK in str(value).lower():
            found.append(f"{path} names the attack")
        elif isinstance(value, torch.nn.Module):
            own = value.state_dict()
            if own.keys() == oracle.keys() and all(torch.equal(own[name], oracle[name]) for name in own):
                found.append(f"{path} is the oracle")
        elif isinstance(value, np.ndarray):
            if any(value.shape == mask.shape and np.array_equal(value, mask) for mask in masks):
                found.append(f"{path} is a secret mask")
            if value.dtype == np.uint8 and any(part.tobytes() in tests for part in (value, *(value if value.ndim > 2 else ()))):
                found.append(f"{path} holds a test image")
            elif value.dtype.kind == "f" and value.ndim > 2 and any(shade(part) in shades for part in (value, *value)):
                found.append(f"{path} holds a test image, in other numbers")
    return found


def shade(image: np.ndarray) -> bytes:
    """What stays of an image, whatever its units, its normalisation and the order of its axes: its pixels' values, ranked."""
    values = np.sort(image, axis=None).astype(np.float64)
    spread = np.ptp(values) if values.size else 0.0
    return np.round((values - values[0]) / spread, 3).tobytes() if spread else b""


@pytest.fixture(scope="module")
def spied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Case]:
    folder = tmp_path_factory.mktemp("grid")
    path = small_grid(folder, recipe=RECIPE, attacks={ATTACK: None}, defences={"spy": None})
    cells = cells_of(load_grid(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nab_defense.grid.figures.WORKS", 0.0)
        run_cells(cells, folder / "out", tell=lambda line: None)
    return SEEN[-1], Case(cells[0].setting, folder / "out", folder / "work")


def test_a_spy_finds_nothing(spied: tuple[Task, Case]) -> None:
    task, case = spied
    assert case.truth.poisoned.any() and case.truth.cover.any()
    assert np.array_equal(task.source.labels, case.session.source.labels)  # the images of this very case
    assert secrets(task, case) == []
    assert secrets(task.session(), case) == []  # what the defences work with
    paths = [path for path, _ in inside(task)]
    assert len(paths) > 500 and any("source.load.pixels" in path for path in paths)  # the spy did look


def test_the_spy_finds_what_is_hidden(spied: tuple[Task, Case]) -> None:
    task, case = spied
    test = case.session.test_source
    normalised = torch.from_numpy(test.pixels(1).copy()).permute(2, 0, 1)[None].float() / 127 - 1
    hidden: list[Any] = [
        case.truth, lambda: case, {"a": [case.truth.poisoned.copy()]}, case.session.recipe, case.session.source,
        f"runs/{ATTACK}", Path(ATTACK), normalised, test.load, torch.from_numpy(case.truth.true_labels.copy()), case.measured,
        case.oracle_plan, ~case.truth.poisoned, np.flatnonzero(case.truth.poisoned).tolist(),
        set(np.flatnonzero(case.truth.cover)), case.truth.poisoned | case.truth.cover,
        copy.deepcopy(case.twins.oracle), test.image(1),
    ]  # fmt: skip
    for secret in hidden:
        assert secrets((task, secret), case), secret


def test_the_order_of_images_says_nothing() -> None:
    labels = np.repeat(np.arange(10), 60)  # as a folder is read
    pixels = np.zeros((600, 2, 2), np.uint8)
    source = Source("folder", tuple("abcdefghij"), labels, tuple(map(str, range(600))), Pictures(tuple(pixels)), "L", "", {})
    given, trusted = split_off(source, limit=500, clean=100, seed=0)
    assert sorted(given.ids + trusted.ids) == sorted(source.ids)
    assert np.mean(np.diff(given.labels) == 0) < 0.2 and abs(np.corrcoef(given.labels, np.arange(500))[0, 1]) < 0.2


def test_names_of_images_say_nothing(spied: tuple[Task, Case]) -> None:
    task, _ = spied
    for source in (task.source, task.clean):
        assert isinstance(source, Source) and source.ids == tuple(f"{i:06d}" for i in range(len(source)))
        assert not source.irregular
