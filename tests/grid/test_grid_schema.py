"""Reading a grid: one line for a mistake, and cells in a stable order under stable names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nab_defense.checkpoint import Network
from nab_defense.grid import cells_of, find_cells, load_grid
from nab_defense.grid.cells import defended_recipe
from tests.digits_runs import ROOT, TINY
from tests.grid.small import RECIPE, small_grid


def refused(folder: Path, **sections: Any) -> str:
    with pytest.raises(ValueError) as caught:
        cells_of(load_grid(small_grid(folder, **sections)))
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_mistakes_name_the_key_and_the_nearest(tmp_path: Path) -> None:
    assert "'seed'" in refused(tmp_path, seed=[0]) and "did you mean 'seeds'" in refused(tmp_path, seed=[0])
    assert "did you mean 'rates'" in refused(tmp_path, attacks={"badnets": {"rate": [0.1]}})
    assert "did you mean 'blend'" in refused(tmp_path, attacks={"blennd": None})
    assert "did you mean 'drop'" in refused(tmp_path, defences={"dropp": None})
    assert "did you mean 'lga'" in refused(tmp_path, defences={"p": {"defence": "nab_paper", "params": {"detector": "lgb"}}})
    assert "recipe.attack" in refused(tmp_path, recipe={**RECIPE, "attack": "blend"})
    assert "recipe.train" in refused(tmp_path, defences={"nab": {"recipe": {"train": {"epochs": 2}}}})
    assert "no key 'train.epoch'" in refused(tmp_path, recipe={**RECIPE, "train": {"epoch": 2}})
    assert "data.test" in refused(tmp_path, recipe={**RECIPE, "data": {"source": "digits"}})
    assert "clean" in refused(tmp_path, clean=0)
    told = {"relabel": {"name": "trusted", "trusted": "data/test"}}  # may hold the test images, or the true labels
    assert "defences.nab: relabel.trusted cannot be set" in refused(tmp_path, defences={"nab": {"recipe": told}})
    assert "relabel.trusted cannot be set" in refused(tmp_path, recipe={**RECIPE, **told})
    typo = {"nab": {"recipe": {"scan": {"epoch": 3}}}}
    assert "defences.nab: " in refused(tmp_path, defences=typo) and "no key 'scan.epoch'" in refused(tmp_path, defences=typo)
    unknown = refused(tmp_path, defences={"nab": {"recipe": {"scan": {"detector": "lgb"}}}})
    assert "defences.nab with networks.resnet: " in unknown and "did you mean 'lga'" in unknown
    assert "networks.r.seed cannot be set" in refused(tmp_path, networks={"r": {"model": TINY["model"], "seed": 7}})
    assert "attacks.none poisons nothing" in refused(tmp_path, attacks={"none": {"rates": [0.1]}})
    assert "is there twice" in refused(tmp_path, seeds=[0, 0])
    assert "target does nothing" in refused(tmp_path, attacks={"blend": {"mode": "all_to_all", "target": 3}})
    assert "changes no label" in refused(tmp_path, attacks={"sig": {"mode": "all_to_all"}})
    several = {"mode": "all_to_all", "params": {"triggers": ["badnets", "sig"]}}
    assert "changes no label" in refused(tmp_path, attacks={"several": several})
    assert "class 1 is both the target and a source" in refused(tmp_path, attacks={"tact": {"target": 1}})
    assert "networks.r: timm has no model 'resnet19'" in refused(tmp_path, networks={"r": {"model": {"name": "resnet19"}}})
    middle = {"nab": {"recipe": {"stamp": {"corner": "middle"}}}}
    assert "defences.nab with networks.resnet: stamp corner must be one of" in refused(tmp_path, defences=middle)
    empty = {"ibau": {"defence": "purify", "params": {"settings": None}}}
    assert "defences.ibau: settings must be keys and values, got None" in refused(tmp_path, defences=empty)
    assert "recipe.scan is empty" in refused(tmp_path, defences={"nab": {"recipe": {"scan": None}}})


def test_seed_0_of_everything_comes_first(tmp_path: Path) -> None:
    attacks = {"none": None, "badnets": None, "sig": {"rates": [0.05]}}
    cells = cells_of(load_grid(small_grid(tmp_path, attacks=attacks, rates=[0.2, 0.1], seeds=[0, 1])))
    places = [(c.setting.seed, c.setting.attack, c.setting.rate, c.defence) for c in cells]
    settings = [(0, "none", 0), (0, "badnets", 0.2), (0, "sig", 0.05), (0, "badnets", 0.1)]
    assert places[:8] == [(*setting, defence) for setting in settings for defence in ("none", "oracle")]
    assert len(places) == 2 * 4 * 2
    assert [seed for seed, *_ in places] == [0] * 8 + [1] * 8


def test_keys_follow_what_determines_a_cell(tmp_path: Path) -> None:
    def keys(**sections: Any) -> list[str]:
        return [cell.key for cell in cells_of(load_grid(small_grid(tmp_path, **sections)))]

    plain = keys()
    assert plain == keys() and len(set(plain)) == 2
    assert plain == keys(defences={"none": None, "mine": {"defence": "oracle"}})  # what a row is called changes nothing
    others = [keys(seeds=[1]), keys(clean=50), keys(rates=[0.1]), keys(recipe={**RECIPE, "fraction": 0.1})]
    assert all(not set(plain) & set(other) for other in others)


def test_a_cell_is_found_by_a_part_of_its_name(tmp_path: Path) -> None:
    cells = cells_of(load_grid(small_grid(tmp_path)))
    assert find_cells(cells, "badnets-20pct-oracle") == [cells[1]] == find_cells(cells, cells[1].key)
    for part in ("nowhere", "badnets"):
        with pytest.raises(ValueError, match=part):
            find_cells(cells, part)


def test_a_defence_is_told_nothing_of_attack_or_test(tmp_path: Path) -> None:
    (cell,) = cells_of(load_grid(small_grid(tmp_path, defences={"nab": {"recipe": {"stamp": {"seed": 7, "value": "noise"}}}})))
    told, whole = defended_recipe(cell), cell.setting.recipe
    assert whole.attack is not None and whole.data.test == "digits"
    assert told.attack is None and told.data.test is None and told.data.truth is None and told.data.source == "given"
    assert told.stamp.seed == 7 and told.train == whole.train and told.model == whole.model and told.seed == whole.seed
    assert told.data.mean == whole.data.mean


GRIDS = sorted((ROOT / "recipes" / "bench").glob("*.yaml"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_grids_that_ship(path: Path) -> None:
    grid = load_grid(path)
    cells = cells_of(grid, str(path))
    assert f"python tools/bench.py recipes/bench/{path.name}" in path.read_text()
    assert len({cell.key for cell in cells}) == len(cells) and {"none", "oracle", "nab"} <= set(grid.defences)
    assert len(grid.seeds) >= 3 and (len(grid.attacks) > 10 or path.stem in ("cpu_more", "digits_tact", "digits_filters"))
    for network in grid.networks:
        model = next(cell.setting.recipe for cell in cells if cell.setting.network == network).model
        with torch.device("meta"):  # shapes without the work
            built = Network(model.name, 10, model.in_chans, model.small_stem, False, dict(model.kwargs)).build().eval()
            size = cells[0].setting.recipe.data.size or 8
            assert built(torch.zeros(1, model.in_chans, size, size)).shape == (1, 10)
