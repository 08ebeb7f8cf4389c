"""Every recipe that ships parses, builds its network and transform, and says how it is run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from nab_defense.checkpoint import Network
from nab_defense.data import build_transform
from nab_defense.methods import check_methods
from nab_defense.recipe import load_recipe
from nab_defense.schema import Recipe
from nab_defense.session import train_config
from nab_defense.stamp import Stamp
from tests.digits_runs import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    check_methods(recipe)
    assert train_config(recipe.train).epochs == recipe.train.epochs
    size, model = recipe.data.size or 8, recipe.model
    with torch.device("meta"):  # shapes without the work
        network = Network(model.name, 10, model.in_chans, model.small_stem, False, dict(model.kwargs)).build().eval()
        assert network(torch.zeros(1, model.in_chans, size, size)).shape == (1, 10)
    image = Image.new("L" if model.in_chans == 1 else "RGB", (size + 3, size + 1))
    pixels = build_transform(recipe.train.augment, size, hflip=recipe.train.hflip)(image)
    assert pixels.shape == (model.in_chans, size, size) and pixels.dtype == torch.uint8
    Stamp(**recipe.stamp.model_dump()).region(size, size)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header_gives_a_command_that_works(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    if path.stem == "quickstart_digits":
        assert "make quickstart" in header and f"recipes/{path.name}" in (ROOT / "Makefile").read_text()
        return
    command = re.search(rf"python tools/train\.py recipes/{path.name}([^\n]*)", header)
    assert command is not None, "no header with the command"
    overrides = [word for word in command[1].split() if "=" in word]
    assert isinstance(load_recipe(path, overrides), Recipe)
