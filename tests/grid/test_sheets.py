from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nab_defense.data import open_source
from nab_defense.grid.sheets import COLUMNS, GAP, contact_sheet


def test_three_rows_a_pair_before_after_and_the_change_at_full_contrast() -> None:
    before = open_source("digits").subset(np.arange(30))
    shown = before.subset(np.arange(5, 30))

    def brighter(index: int) -> np.ndarray:
        pixels = shown.pixels(index)[..., 0].copy()
        pixels[0, 0] = 5
        return pixels

    assert not any(shown.pixels(i)[0, 0] for i in range(25))
    after = shown.replaced(labels=shown.labels, load=brighter, change="brighter")
    sheet = np.asarray(contact_sheet([(before, after), (before, shown)]))
    cell = 64 + GAP
    assert sheet.shape == (6 * cell, COLUMNS * cell, 3)
    first = [sheet[row * cell : row * cell + 64, :64] for row in range(6)]
    enlarged = shown.pixels(0).repeat(8, 0).repeat(8, 1)
    assert (first[0] == enlarged).all() and (first[3] == first[0]).all() and (first[4] == first[0]).all()
    assert (first[1][:8, :8] == 5).all() and (first[1][8:] == first[0][8:]).all()
    assert (first[2][:8, :8] == 255).all() and not first[2][8:].any() and not first[5].any()


def test_images_of_several_sizes(tmp_path: Path) -> None:
    for label, shape in enumerate(((20, 24), (28, 20), (64, 70))):
        (tmp_path / f"c{label}").mkdir()
        Image.fromarray(np.full((*shape, 3), 9, np.uint8)).save(tmp_path / f"c{label}" / "0.png")
    source = open_source(str(tmp_path))
    sheet = np.asarray(contact_sheet([(source, source)]))
    assert sheet.shape == (3 * (84 + GAP), 96 + 60 + 70 + 3 * GAP, 3)  # four times 20x24, three times 28x20, and 64x70
    assert (sheet[:80, :96] == 9).all() and (sheet[:84, 98:158] == 9).all() and not sheet[80:84, :96].any()


def test_nothing_to_show_is_refused() -> None:
    source = open_source("digits").subset(np.arange(3))
    with pytest.raises(ValueError, match="needs images that the attack changes"):
        contact_sheet([(source, source.subset(np.arange(0)))])
