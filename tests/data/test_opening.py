"""What a source is opened with, and how some of it is chosen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nab_defense.data import open_source


def test_samples_are_chosen_by_places_or_by_a_mask() -> None:
    source = open_source("digits")
    threes = source.subset(source.labels == 3)
    assert len(threes) == (source.labels == 3).sum() and (threes.labels == 3).all()
    assert threes.ids == source.subset(np.flatnonzero(source.labels == 3)).ids and len(source.subset([])) == 0
    for rows, told in (
        (np.ones(3, bool), r"a mask for 1438 samples must be \(1438,\), got \(3,\)"),
        ([0.9, 1.7], r"whole numbers or an \(N,\) bool mask, got \(2,\) float64"),
        ([[0, 1]], r"got \(1, 2\) int64"),
    ):
        with pytest.raises(ValueError, match=told):
            source.subset(rows)  # type: ignore[arg-type]


def test_a_path_opens_and_a_misspelt_argument_is_named(tmp_path: Path) -> None:
    for name in ("cat/0.png", "dog/0.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert open_source(tmp_path).fingerprint == open_source(str(tmp_path)).fingerprint
    for wrong, right in (("chanels", "channels"), ("stricct", "strict")):
        with pytest.raises(ValueError, match=f"takes no '{wrong}'; did you mean '{right}'"):
            open_source("digits", **{wrong: 1})  # type: ignore[arg-type]
    assert open_source("digits", root="data", search_split=True).mode == "L"  # of a named set, of which there may be one, too
