"""Triggers that are as fine as pixels, painted on images that are shrunk afterwards: the user is told, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nab_defense.recipe import load_recipe
from nab_defense.session import Session
from tests.digits_runs import write_images, write_recipe

INNER = {"name": "bpp", "params": {"bits": 3}}
MEAN = {"mean": [0.5, 0.5, 0.5]}


def session(folder: Path, attack: dict[str, Any], size: int | None, **goal: Any) -> Session:
    images = str(write_images(folder / "images", each=5, edge=16))
    data = {"source": images, "test": images, "limit": None, "test_limit": None, "size": size, **MEAN, "std": [0.5] * 3}
    recipe = write_recipe(folder, data=data, model={"in_chans": 3}, attack={"rate": 0.2, "target": 0, **attack, **goal})
    return Session(load_recipe(recipe), folder / "run", resume=False)


@pytest.mark.parametrize(
    ("attack", "painter"),
    [
        ({"name": "bpp"}, "Bpp"),
        ({"name": "wanet"}, "WaNet"),
        ({"name": "tact", "params": {"trigger": INNER, "covers": 0}}, "Bpp"),
        ({"name": "stamp_aware", "params": {"trigger": "wanet", "covers": 0, **MEAN}}, "WaNet"),
        ({"name": "several", "params": {"triggers": ["badnets", "wanet"]}}, "WaNet"),
    ],
)
def test_a_fine_trigger_that_shrinking_wipes_out_is_told_once(
    attack: dict[str, Any], painter: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shrunk = session(tmp_path, attack, 8)
    assert shrunk.truth is not None and shrunk.cases() is not None
    (record,) = caplog.records
    told = f"{painter} paints {tmp_path / 'images'} at 16 px and the network is shown 8 px, so that little of the trigger is left"
    assert record.levelname == "WARNING" and record.getMessage().startswith(told)


def test_it_is_told_where_a_network_is_only_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    session(tmp_path, {"name": "bpp"}, 8, poison=False).cases()
    assert "Bpp paints" in caplog.text


@pytest.mark.parametrize(("name", "size"), [("bpp", 16), ("wanet", None), ("wanet", 32), ("badnets", 8), ("blend", 8)])
def test_nothing_is_told_of_other_sizes_and_triggers(
    name: str, size: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = session(tmp_path, {"name": name}, size)
    assert whole.truth is not None and whole.size == (size or 16)
    assert not caplog.records
