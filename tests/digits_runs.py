"""What the tests of commands share: tiny recipes, image folders, and the one line that a mistake must give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from nab_defense.cli import main

ROOT = Path(__file__).resolve().parents[1]
TINY: dict[str, Any] = {
    "data": {"source": "digits", "test": "digits", "limit": 200, "test_limit": 60, "mean": [0.306], "std": [0.376]},
    "model": {
        "name": "resnet10t",
        "in_chans": 1,
        "small_stem": True,
        "kwargs": {"stem_type": "deep", "stem_width": 8, "channels": [8, 16, 16, 32], "avg_down": False},
    },
    "scan": {"epochs": 1, "lr": 0.005},
    "relabel": {"params": {"epochs": 1}},
    "train": {"epochs": 1, "batch_size": 64, "lr": 0.05, "augment": "crop_flip", "hflip": 0.0},
    "runtime": {"threads": 1},
}


def write_recipe(folder: Path, **sections: Any) -> Path:
    """TINY with some sections updated; a section that is no mapping replaces."""
    tree = dict(TINY)
    for key, value in sections.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


# Found by the scan, on every processor: TINY's network is too small for that. Relabels, drops and covers some.
BLEND: dict[str, dict[str, Any]] = {
    "data": {"limit": 800},
    "attack": {"name": "blend", "rate": 0.15, "params": {"alpha": 0.3}},
    "model": {"kwargs": {"stem_type": "deep", "stem_width": 8, "channels": [16, 32, 64, 128], "avg_down": False}},
    "scan": {"epochs": 8},
    "relabel": {"params": {"epochs": 4}},
    "train": {"epochs": 15},
}


def write_images(folder: Path, *, classes: int = 2, each: int = 3, mode: str = "RGB", edge: int = 8) -> Path:
    shape = (edge, edge, 3) if mode == "RGB" else (edge, edge)
    for label in range(classes):
        (folder / f"c{label}").mkdir(parents=True)
        for index in range(each):
            pixels = np.random.default_rng([label, index]).integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"c{label}" / f"{index}.png")
    return folder


def write_noise(folder: Path, *, each: int = 6) -> Path:
    """Images of nothing, in the classes of digits."""
    write_images(folder, classes=10, each=each, mode="L")
    for label in range(10):
        (folder / f"c{label}").rename(folder / str(label))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below, less what a run in progress keeps for itself."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and "stages" not in p.parts)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


class Mistakes:
    """Runs a command that must end with one line, exit status 2, and every file as it was."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys, self.folder = capsys, folder
        self.out = folder / "out"
        self.out.mkdir()
        for name in ("result.json", "suspects.csv", "recipe.yaml"):
            (self.out / name).write_text(f"an older {name}")

    def __call__(self, *argv: str | Path, says: tuple[str, ...]) -> str:
        before = contents(self.folder)
        try:
            status = main([str(part) for part in argv])
        except SystemExit as stop:
            status = stop.code  # type: ignore[assignment]
        said = self.capsys.readouterr()
        lines = said.err.splitlines()
        assert status == 2, said
        assert len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in said.err, said.err
        missing = [word for word in says if word not in lines[0]]
        assert not missing, f"{missing} not in {lines[0]!r}"
        after = contents(self.folder)
        assert {name: after.get(name) for name in before} == before
        assert "out/model.safetensors" not in after
        return lines[0]

    def train(self, recipe: Path, *extra: str, says: tuple[str, ...]) -> str:
        return self("train", recipe, *extra, "--out", self.out, says=says)
