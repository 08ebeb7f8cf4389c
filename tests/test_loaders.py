from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nab_defense.data import Distortion, ResidentLoader, open_source
from nab_defense.loaders import Loaders
from nab_defense.recipe import parse_recipe
from nab_defense.runtime import Runtime
from nab_defense.session import Session
from nab_defense.stamp import Stamp
from nab_defense.types import NABPlan


def loaders(size: int = 8) -> Loaders:
    runtime = Runtime(device="cpu", precision="float32")
    return Loaders(size=size, mean=(0.3,), std=(0.2,), hflip=0.0, stamp=Stamp(), runtime=runtime)


@pytest.mark.parametrize(
    ("augment", "size", "ours"), [("none", 8, True), ("crop_flip", 8, True), ("timm", 8, False), ("none", 72, False)]
)
def test_small_images_are_held_and_others_left_to_timms_loader(augment: str, size: int, ours: bool) -> None:
    loader = loaders(size)(open_source("digits").subset(range(40)), augment, 16, training=True)
    assert isinstance(loader, ResidentLoader) is ours
    images, labels = next(iter(loader))
    assert images.shape == (16, 1, size, size) and labels.shape == (16,)


def test_both_ways_give_the_same_batches_of_a_plan() -> None:
    source = open_source("digits").subset(range(40))
    some, no = np.arange(40) % 5 == 0, np.zeros(40, dtype=bool)
    plan = NABPlan(source.labels, np.where(some, (source.labels + 1) % 10, source.labels), some, ~np.roll(some, 1), no)

    def batches(*, room: bool) -> list[Any]:
        make = loaders()
        make.store.free *= room
        torch.manual_seed(0)
        return list(make(source, "crop_flip", 16, training=True, plan=plan))

    held, read = batches(room=True), batches(room=False)
    assert len(held) == 2 and all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(held, read, strict=True))


@pytest.mark.parametrize("room", [True, False], ids=["held", "read"])
def test_a_recipes_distortion_reaches_training_alone(room: bool, tmp_path: Path) -> None:
    data = {"source": "digits", "limit": 64, "mean": [0.0], "std": [1.0]}
    train = {"augment": "crop_flip", "batch_size": 64, "color_jitter": 0.5, "erase": 1.0}
    recipe = parse_recipe({"name": "r", "data": data, "train": train, "model": {"in_chans": 1}}, (), "r")
    session = Session(recipe, tmp_path / "out", resume=False)
    assert session.loaders.augmenting == {"hflip": 0.5, "distortion": Distortion(0.5, 1.0)}
    session.loaders.store.free *= room
    source, plan = session.source, NABPlan.empty(session.source.labels)
    plain = next(iter(session.ordered(source)))[0]
    assert torch.equal(next(iter(session.scan_loader(source)))[0].sum(), plain.sum())
    trained = next(iter(session.train_loader(plan, "crop_flip")))[0]
    assert (trained.flatten(1) == 0).sum(1).min() > 0 and trained.sum() < 0.9 * plain.sum()
