"""What is held of a run's sources: decoded once, shared where it is the same, and bounded."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nab_defense import ranks
from nab_defense.bench.attacks import create
from nab_defense.bench.poison import poison_source, triggered_source
from nab_defense.data import Source, Store, build_transform, open_source
from nab_defense.data.store import SMALL
from tests.digits_runs import write_images

CPU = torch.device("cpu")


class Counted:
    """Twenty random images in grey, and how often each was asked for; number `broken` cannot be read."""

    def __init__(self, edge: int = 8, broken: int | None = None) -> None:
        self.edge, self.broken, self.asked = edge, broken, Counter[int]()

    def __call__(self, index: int) -> Image.Image:
        self.asked[index] += 1
        if index == self.broken:
            raise ValueError(f"sample {index} of 'here' cannot be read: truncated")
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (self.edge, self.edge), dtype=np.uint8))

    def source(self) -> Source:
        return Source("here", ("a", "b"), np.arange(20) % 2, tuple(map(str, range(20))), self, "L", "f", {})


def held(store: Store, source: Source, augment: str = "none") -> torch.Tensor:
    found = store.find(source, augment)
    assert found is not None
    images, rows = found
    return images.pixels[torch.from_numpy(rows)]


def test_each_image_is_decoded_once_for_all_stages() -> None:
    counted, store = Counted(), Store(8, CPU)
    source = counted.source()
    relabelled = source.replaced(labels=1 - source.labels, load=source.load, change="relabel")
    part = relabelled.subset([3, 1, 12])
    whole = held(store, source)
    assert torch.equal(whole, held(store, source, "crop_flip")) and torch.equal(whole, held(store, relabelled, "crop_flip"))
    assert torch.equal(held(store, part), whole[[3, 1, 12]]) and torch.equal(held(store, part.subset([2])), whole[[12]])
    np.testing.assert_array_equal(whole[:, 0].numpy(), np.stack([source.pixels(i)[..., 0] for i in range(20)]))
    assert set(counted.asked.values()) == {2}  # once for the store, once for the line above


def test_files_decoded_side_by_side_keep_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nab_defense.data.store.TOGETHER", 2)
    write_images(tmp_path / "images", each=9, edge=10)
    source = open_source(str(tmp_path / "images"))
    with torch.inference_mode():  # as a scan reads them
        whole = held(Store(10, CPU), source)
    np.testing.assert_array_equal(whole.permute(0, 2, 3, 1).numpy(), np.stack([source.pixels(i) for i in range(18)]))
    (tmp_path / "images" / "c1" / "8.png").unlink()
    source.load.cache.clear()  # type: ignore[attr-defined]
    with pytest.raises(OSError, match=r"8\.png"):
        held(Store(10, CPU), source)


def test_nothing_is_decoded_before_it_is_asked_for_and_then_only_the_part() -> None:
    counted, store = Counted(), Store(8, CPU)
    found = store.find(counted.source().subset([4, 2]), "none")
    assert found is not None and not counted.asked
    assert found[0].pixels.shape == (2, 1, 8, 8) and dict(counted.asked) == {4: 1, 2: 1}


def test_images_of_another_size_are_held_as_each_augmentation_wants_them() -> None:
    counted, store = Counted(edge=20), Store(8, CPU)
    source = counted.source()
    plain, rough = held(store, source), held(store, source, "crop_flip")
    assert not torch.equal(plain, rough)
    assert torch.equal(plain[3], build_transform("none", 8)(source.image(3)))
    assert torch.equal(rough[3], build_transform("crop_flip", 8, hflip=0, crop_pad=0)(source.image(3)))


def test_poison_and_triggers_have_pixels_of_their_own() -> None:
    store, clean = Store(8, CPU), open_source("digits").subset(range(100))
    poisoned, truth = poison_source(clean, create("badnets"), rate=0.1, target=0, seed=1)
    triggered, _ = triggered_source(clean, create("badnets"), target=0, seed=1)
    same = (held(store, clean) == held(store, poisoned)).flatten(1).all(1)
    assert same.tolist() == (~truth.poisoned).tolist()
    for row in (0, 50):
        np.testing.assert_array_equal(held(store, triggered)[row, 0].numpy(), triggered.pixels(row)[..., 0])


@pytest.mark.parametrize(
    ("size", "augment", "free", "says"),
    [
        (8, "timm", None, "augment 'timm' works image by image"),
        (8, "albumentations", None, "augment 'albumentations' works image by image"),
        (SMALL + 1, "none", None, "65 px images are larger than 64 px"),
        (8, "none", 1000, "0.0 MB are more than the 0.0 MB that may be used"),
    ],
)
def test_what_is_left_to_timms_loader_is_said_once(
    size: int, augment: str, free: int | None, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, source = Store(size, CPU), Counted().source()
    if free is not None:
        store.free = free
    with caplog.at_level(logging.INFO, logger="nab_defense"):
        assert store.find(source, augment) is None and store.find(source, augment) is None
    assert [record.message for record in caplog.records] == [f"here: read by timm's loader: {says}"]


def test_what_is_held_stays_within_the_share(caplog: pytest.LogCaptureFixture) -> None:
    store, sources = Store(8, CPU), [Counted().source() for _ in range(3)]
    store.free = 2 * 20 * 64  # room for two of them
    with caplog.at_level(logging.INFO, logger="nab_defense"):
        found = [store.find(source, "none") for source in sources]
        assert [made is not None for made in found] == [True, True, False] and store.free == 0
        assert store.find(sources[1].subset([1]), "crop_flip") is None  # not known to be the same before it is decoded
        assert found[1] is not None and found[1][0].pixels.nbytes == 20 * 64
        assert store.find(sources[1].subset([1]), "crop_flip") is not None
    assert "here: 20 images at 8 px held in memory, 0.0 MB" in [record.message for record in caplog.records]


@pytest.mark.parametrize("room", [True, False])
def test_what_was_decided_for_training_stands(room: bool, tmp_path: Path) -> None:
    source, record = Counted().source(), tmp_path / "held.json"
    for free in (room, not room):
        store = Store(8, CPU)
        store.free *= free
        assert (store.settle(source.subset([1]), "none") is not None) == free  # of no run that may be resumed
        store.record = record
        assert (store.settle(source, "none") is not None) == room
        assert json.loads(record.read_text()) == {f"none {source.fingerprint}": room}


@pytest.mark.parametrize("room", [True, False])
def test_the_first_of_several_ranks_decides_for_training(room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(ranks, "same", lambda value: asked.append(value) or room)
    store = Store(8, CPU)
    store.free *= not room
    assert (store.settle(Counted().source(), "none") is not None) == room and asked == [not room]


def test_the_share_is_of_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 << 20 < Store(8, CPU).free < 1 << 44
    monkeypatch.setattr("nab_defense.data.store.spare_bytes", lambda: 4000)
    assert Store(8, CPU).free == 1000
    monkeypatch.setattr("nab_defense.data.store.spare_bytes", lambda: None)
    assert Store(8, CPU).free == 1 << 30


def test_an_unreadable_image_is_named_when_it_is_read_and_every_time() -> None:
    found: Any = Store(8, CPU).find(Counted(broken=7).source(), "none")
    for _ in range(2):
        with pytest.raises(ValueError, match="sample 7 of 'here' cannot be read: truncated"):
            found[0].pixels  # noqa: B018
