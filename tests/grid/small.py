"""A grid on digits that runs in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.digits_runs import TINY

__all__ = ["small_grid"]

RECIPE: dict[str, Any] = {key: TINY[key] for key in ("scan", "relabel", "train", "runtime")}
RECIPE |= {"data": {**TINY["data"], "limit": 200, "test_limit": 60}}


def small_grid(folder: Path, **sections: Any) -> Path:
    """A YAML file with these sections in place of the usual ones."""
    tree = {
        "recipe": RECIPE,
        "clean": 40,
        "networks": {"resnet": {"model": TINY["model"]}},
        "attacks": {"badnets": None},
        "rates": [0.2],
        "defences": {"none": None, "oracle": None},
        "seeds": [0],
        **sections,
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path
