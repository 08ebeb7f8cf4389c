"""Data sets and pipelines in loader processes, also where these are spawned and everything is sent to them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nab_defense.bench.attacks import CoverAttack, attacks, create
from nab_defense.bench.poison import poison_source, triggered_source
from nab_defense.bench.trigger import prepared
from nab_defense.data import Source, build_loader, build_transform, open_source
from nab_defense.data.transforms import AUGMENTATIONS
from nab_defense.dataset import NABDataset
from nab_defense.runtime import Runtime
from nab_defense.stamp import Stamp
from nab_defense.types import NABPlan
from tests.bench.quick import QUICK
from tests.digits_runs import write_images


def sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301


def digits() -> Source:
    return open_source("digits").subset(range(0, 100, 2))


def poisoned(name: str) -> Source:
    attack = prepared(create(name, **QUICK.get(name, {})), digits(), target=0, seed=1)
    source, truth = poison_source(digits(), attack, rate=0.08, target=0, seed=1)
    assert truth.poisoned.sum() == 4 and truth.cover.any() == isinstance(attack, CoverAttack)
    return source


def triggered() -> Source:
    return triggered_source(digits(), create("badnets"), target=0, seed=1)[0]


SOURCES: dict[str, Callable[[str], Source]] = {
    "digits": lambda _: open_source("digits"),
    "folder": open_source,
    "subset of a folder": lambda folder: open_source(folder).subset([4, 1]),
    "torchvision": lambda folder: open_source("torch/image_folder", root=folder),
    "triggered": lambda _: triggered(),
    **{f"poisoned by {name}": lambda _, name=name: poisoned(name) for name in attacks.names()},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", SOURCES)
def test_views_pickle(name: str, tmp_path: Path) -> None:
    view = SOURCES[name](str(write_images(tmp_path / "images"))).view()
    for _ in range(2):  # the second time the images have been looked at, and some are kept
        copy = sent(view)
        assert copy.fingerprint == view.fingerprint and len(copy) == len(view)
        for index in range(len(view)):
            (image, label), (expected, given) = copy[index], view[index]
            assert image.mode == expected.mode and label == given
            np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_decoded_images_are_not_sent_along(tmp_path: Path) -> None:
    source = open_source(str(write_images(tmp_path / "images", edge=200)))
    assert len(pickle.dumps(source.view())) < 10_000 < source.pixels(0).nbytes


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_pipelines_pickle(augment: str) -> None:
    image, transform = open_source("digits").image(0), build_transform(augment, 8)
    drawn = []
    for pipeline in (transform, sent(transform)):
        torch.manual_seed(0)
        drawn.append(pipeline(image))
    assert drawn[0].shape == drawn[1].shape and (augment == "timm" or torch.equal(*drawn))  # timm's draws from Python


def test_a_spawned_loader_process_gives_the_same_batches() -> None:
    source = poisoned("badnets")
    some, no = np.arange(len(source)) % 7 == 0, np.zeros(len(source), dtype=bool)
    plan = NABPlan(source.labels, np.where(some, (source.labels + 1) % 10, source.labels), some, ~no, no)

    def batches(workers: int) -> list[Any]:
        loader = build_loader(
            NABDataset(source.view(), plan, Stamp(), mean=(0.3,), std=(0.2,)), build_transform("none", 8), size=8, batch_size=32,
            mean=(0.3,), std=(0.2,), runtime=Runtime(device="cpu", workers=workers),
        )  # fmt: skip
        if workers:
            loader.loader.multiprocessing_context = "spawn"
        return list(loader)

    here, spawned = batches(0), batches(1)
    assert [len(labels) for _, labels in here] == [32, 18]
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(here, spawned, strict=True))
