from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nab_defense.data import ResidentLoader, open_source
from nab_defense.loaders import Loaders
from nab_defense.runtime import Runtime
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
