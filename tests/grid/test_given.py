"""What a setting is made of: each seed its own images and its own poison, the same for all defences, and not to be drawn anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nab_defense.data import Source, open_source
from nab_defense.grid import cells_of, load_grid
from nab_defense.grid.case import Case
from nab_defense.grid.given import split_off
from nab_defense.session import Session
from tests.grid.small import small_grid

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Case]:
    """A case for each cell, made anew, as where cells are run one at a time."""
    folder = tmp_path_factory.mktemp("grid")
    grid = small_grid(folder, defences={"none": None, "drop": None, "nab": None}, seeds=list(SEEDS))
    cells = cells_of(load_grid(grid))
    return {(c.setting.seed, c.defence): Case(c.setting, folder, folder / str(place)) for place, c in enumerate(cells)}


def images(source: Source) -> set[bytes]:
    return {source.pixels(index).tobytes() for index in range(len(source))}


def drawn(case: Case, seed: int, folder: Path) -> NDArray[np.bool_]:
    """Which of a case's images are poisoned by its attack with another seed."""
    recipe = case.setting.recipe
    assert recipe.attack is not None
    attack = recipe.attack.model_copy(update={"seed": seed})
    session = Session(recipe.model_copy(update={"attack": attack}), folder, resume=False)
    session.whole_source = case.session.whole_source
    truth = session.truth
    assert truth is not None
    return truth.poisoned


def test_defences_of_a_seed_have_one_training_set(cases: dict[tuple[int, str], Case]) -> None:
    marks = [{case.given.fingerprint for (of, _), case in cases.items() if of == seed} for seed in SEEDS]
    assert [len(found) for found in marks] == [1, 1] and marks[0] != marks[1]
    for seed in SEEDS:
        first, *others = (case for (of, _), case in cases.items() if of == seed)
        assert len(others) == 2
        for other in others:
            assert np.array_equal(other.truth.poisoned, first.truth.poisoned)
            assert other.trusted.fingerprint == first.trusted.fingerprint


def test_seeds_have_other_images_and_other_poison(cases: dict[tuple[int, str], Case]) -> None:
    first, second = (cases[seed, "nab"] for seed in SEEDS)
    for name in ("given", "trusted"):
        both = [images(getattr(case, name)) for case in (first, second)]
        assert len(both[0] & both[1]) < 0.5 * len(both[0]), name
    assert images(first.session.clean_source) != images(second.session.clean_source)
    assert not np.array_equal(first.truth.poisoned, second.truth.poisoned)


def test_poison_is_not_what_a_defence_could_draw_with_its_own_seed(cases: dict[tuple[int, str], Case], tmp_path: Path) -> None:
    case, other = (cases[seed, "nab"] for seed in SEEDS)
    assert np.array_equal(drawn(case, case.setting.recipe.attack_seed, tmp_path), case.truth.poisoned)
    for guess in (other.setting.recipe.attack_seed, *SEEDS):  # each seed of the grid has a draw of its own
        assert not np.array_equal(drawn(case, guess, tmp_path), case.truth.poisoned), guess


def test_images_are_split_off_by_seed() -> None:
    whole = open_source("digits")
    parts = [split_off(whole, limit=200, clean=40, seed=seed) for seed in (0, 0, 1)]
    for once, again, other in zip(*parts, strict=True):
        assert once.ids == again.ids != other.ids and len(set(once.ids) & set(other.ids)) < 0.5 * len(once.ids)
