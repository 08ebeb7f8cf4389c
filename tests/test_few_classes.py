"""Digits put together to two and three classes, each of which falls in two by its digits: whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from nab_defense.pipeline import run
from nab_defense.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]


def put_together(folder: Path, classes: int) -> str:
    """The 1,438 training images of digits, with the rest of a division as their class."""
    digits = load_digits()
    for index, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        if index % 5 != 4:
            (folder / str(digit % classes)).mkdir(parents=True, exist_ok=True)
            pixels = np.round(image * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).save(folder / str(digit % classes) / f"{index:05d}.png")
    return f"data.source={folder}"


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "attack"), [(2, "none"), (2, "badnets"), (3, "none"), (3, "badnets"), (3, "blend")])
def test_poison_is_found_and_harmless_styles_are_not(classes: int, attack: str, tmp_path: Path) -> None:
    given = [put_together(tmp_path / "images", classes), "data.test=null", "data.size=8", "baselines=[]", "train.epochs=24"]
    given += ["attack=null"] if attack == "none" else [f"attack.name={attack}"]
    given += ["attack.params={}"] if attack == "badnets" else []
    found: dict[str, Any] = run(load_recipe(ROOT / "recipes" / "quickstart_digits.yaml", given), tmp_path / "out")["detection"]
    if attack == "none":
        assert found["selected"] == found["altered"] == 0
    else:
        assert found["recall"] > 0.9 and found["precision"] > 0.9
