"""Settings and fixtures of all tests; the environment is set before any library reads it."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nab_defense.pipeline import run
from nab_defense.recipe import load_recipe
from nab_defense.scan import Scan
from tests.digits_runs import BLEND, Mistakes, write_recipe

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What attacks learn in tests is kept for the other tests, and nowhere else."""
    os.environ["NAB_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Mistakes:
    return Mistakes(tmp_path, capsys)


@pytest.fixture
def make_scan() -> Callable[..., Scan]:
    """make_scan(features (N, D), labels (N,), logits (N, K) or None) -> Scan; without logits the network only guesses."""

    def make(features: Any, labels: Any, logits: Any = None) -> Scan:
        labels = np.asarray(labels, dtype=np.int64)
        if logits is None:
            logits = np.zeros((len(labels), int(labels.max()) + 1))
        logits = np.asarray(logits, dtype=np.float32)
        losses = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels), reduction="none").numpy()
        return Scan(labels, losses, logits, np.asarray(features, dtype=np.float32), fingerprint="synthetic")

    return make


@pytest.fixture(scope="session")
def blend_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one small finished run, to be read only: Blend on digits, found, with both baselines."""
    folder = tmp_path_factory.mktemp("blend")
    recipe = write_recipe(folder, **BLEND, baselines=["undefended", "oracle"])
    run(load_recipe(recipe), folder / "run")
    return folder / "run"
