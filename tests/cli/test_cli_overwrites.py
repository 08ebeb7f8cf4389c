"""What a command would overwrite, or read as images the next time, and images of other units."""

from __future__ import annotations

from pathlib import Path

from tests.digits_runs import Mistakes, write_images, write_recipe


def test_what_would_be_overwritten_or_read_as_images(tmp_path: Path, mistakes: Mistakes) -> None:
    recipe, images = write_recipe(tmp_path), write_images(tmp_path / "images")
    (tmp_path / "repaired").mkdir()
    (tmp_path / "repaired" / "model.safetensors").write_text("a model that nab purify left")
    mistakes("train", recipe, "--out", tmp_path / "repaired", says=("holds a model that is not of a run", "name another --out"))
    here = ("--out", images / "new")
    mistakes("train", recipe, f"data.source={images}", *here, says=("whose images are read", "name an --out elsewhere"))
    mistakes("scan", images, *here, says=("whose images are read",))
    poison = ("poison", images, "--attack", "badnets", "--rate", "0.4", "--target", "0")
    mistakes(*poison, *here, says=("whose images are read",))
    (tmp_path / "copy.truth.csv").write_text("the truth of a copy that was moved")
    mistakes(*poison, "--out", tmp_path / "copy", says=("copy.truth.csv is of another poisoned copy", "name another --out"))


def test_means_of_other_units(tmp_path: Path, mistakes: Mistakes) -> None:
    units = ("data.mean=[123.7]", "data.std=[58.4]")
    line = mistakes.train(write_recipe(tmp_path), *units, says=("data.mean is in [0, 1]", "got [123.7]"))
    assert "[58.4]" in line
