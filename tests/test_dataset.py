from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset, create_loader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.datasets import VisionDataset
from torchvision.transforms import v2

from nab_defense.dataset import NABDataset
from nab_defense.stamp import Stamp
from nab_defense.types import NABPlan

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
LABELS = np.arange(12) % 3


class Pictures(Dataset[Any]):
    """Twelve 32 px images, each of random pixels of its own; `wrap` makes the label's type."""

    fingerprint = "f" * 64

    def __init__(self, transform: Callable[[Any], Any] | None = None, wrap: Callable[[int], Any] = int) -> None:
        self.transform, self.wrap, self.epoch = transform, wrap, -1

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image: Any = Image.fromarray(np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8))
        return (image if self.transform is None else self.transform(image)), self.wrap(int(LABELS[index]))

    def filename(self, index: int, basename: bool = False) -> str:
        return f"{index}.png" if basename else f"folder/{index}.png"

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def albumentation(image: Any) -> Tensor:
    pipeline = A.Compose([A.HorizontalFlip(p=0.5), A.Normalize(MEAN, STD)], seed=3)
    return torch.from_numpy(pipeline(image=np.asarray(image))["image"]).permute(2, 0, 1)


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "uint8": v1.PILToTensor(),
    "numpy": lambda image: np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)),
    "float": v1.ToTensor(),
    "v1": v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)]),
    "v2": v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Compose([v2.Normalize(MEAN, STD)])]),
    "albumentations": albumentation,
}


def wrap(dataset: Any, plan: NABPlan, **knobs: Any) -> NABDataset:
    return NABDataset(dataset, plan, Stamp(), mean=MEAN, std=STD, **knobs)


def busy_plan() -> NABPlan:
    """Suspects 1 (relabelled), 2 (keeps its label), 3 (dropped); cover 4; drops 3 and 5."""
    at = lambda *indices: np.isin(np.arange(12), indices)  # noqa: E731
    new = np.where(at(1, 3), (LABELS + 1) % 3, LABELS)
    return NABPlan(LABELS, new, at(1, 2, 3), ~at(3, 5), at(4), "f" * 64)


def same(first: Any, second: Any) -> bool:
    batches = list(zip(first, second, strict=True))
    return len(batches) > 0 and all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in batches)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("prefetcher", [False, True])
def test_an_empty_plan_leaves_timms_batches_bit_identical(prefetcher: bool, training: bool) -> None:
    def batches(dataset: Any) -> list[Any]:
        loader = create_loader(
            dataset, (3, 32, 32), 5, is_training=training, use_prefetcher=prefetcher, num_workers=0, persistent_workers=False,
            mean=MEAN, std=STD, device=torch.device("cpu"),
        )  # fmt: skip
        torch.manual_seed(1)
        random.seed(1)  # timm's own steps draw from Python
        return list(loader)

    plain = batches(Pictures())
    assert same(plain, batches(wrap(Pictures(), NABPlan.empty(LABELS))))
    assert sum(len(labels) for _, labels in plain) == (10 if training else 12)


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_an_empty_plan_leaves_items_untouched(name: str) -> None:
    plain = Pictures(TRANSFORMS[name])
    wrapped = wrap(Pictures(TRANSFORMS[name]), NABPlan.empty(LABELS))
    for index in range(12):
        (image, label), (seen, given) = plain[index], wrapped[index]
        assert type(seen) is type(image) and seen.dtype == image.dtype and label == given
        np.testing.assert_array_equal(np.asarray(seen), np.asarray(image))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_empty_plan_leaves_torchs_batches_bit_identical(workers: int) -> None:
    augmented = v1.Compose([v1.RandomCrop(32, padding=4), v1.ToTensor(), v1.Normalize(MEAN, STD)])

    def batches(dataset: Any) -> list[Any]:
        torch.manual_seed(5)
        return list(DataLoader(dataset, 4, shuffle=True, num_workers=workers))

    plain = batches(Pictures(augmented))
    assert same(plain, batches(wrap(Pictures(augmented), NABPlan.empty(LABELS))))


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_a_plan_changes_what_it_says_and_nothing_else(name: str) -> None:
    transform, plan = TRANSFORMS[name], busy_plan()
    # albumentation() hides its Normalize in a function, where nobody can see it
    knobs = {"normalized": True} if name == "albumentations" else {}
    wrapped, plain = wrap(Pictures(transform), plan, **knobs), Pictures(transform)
    assert len(wrapped) == 10
    left = [0, 1, 2, 4, 6, 7, 8, 9, 10, 11]
    assert [wrapped.filename(i) for i in range(10)] == [f"folder/{i}.png" for i in left]
    assert wrapped.filename(3, basename=True) == "4.png"
    for place, index in enumerate(left):
        (image, _), (seen, label) = plain[index], wrapped[place]
        assert label == (LABELS[1] + 1 if index == 1 else LABELS[index]) and type(seen) is type(image)
        image = torch.as_tensor(np.asarray(image))
        if index in (1, 4):
            image = Stamp()(image, mean=MEAN, std=STD, normalized=name in ("v1", "v2", "albumentations"))
        np.testing.assert_array_equal(np.asarray(seen), image.numpy())


def test_stamp_is_the_mean_in_every_pipeline() -> None:
    plan = busy_plan()
    bytes_of_mean = [128, 102, 76]
    colors = {"uint8": bytes_of_mean, "numpy": bytes_of_mean, "float": list(MEAN), "v1": [0, 0, 0], "v2": [0, 0, 0]}
    for name, color in colors.items():
        image, _ = wrap(Pictures(TRANSFORMS[name]), plan)[1]
        np.testing.assert_allclose(np.asarray(image)[:, :2, :2].reshape(3, 4), np.tile(color, (4, 1)).T, atol=1e-6)
    image, _ = wrap(Pictures(albumentation), plan, normalized=True)[1]
    assert not image[:, :2, :2].any()


def test_augmentation_does_not_move_the_stamp() -> None:
    steps = [v1.RandomHorizontalFlip(1), v1.RandomResizedCrop(32), TRANSFORMS["v1"], v1.RandomErasing(1)]
    wrapped = wrap(Pictures(v1.Compose(steps)), busy_plan())
    assert all(not wrapped[place][0][:, :2, :2].any() for place in (1, 3) for _ in range(5))


def test_through_timms_prefetcher_the_stamp_is_grey_to_within_a_level() -> None:
    loader = create_loader(
        wrap(Pictures(), busy_plan()), (3, 32, 32), 10, num_workers=0, mean=MEAN, std=STD, device=torch.device("cpu")
    )
    images, labels = next(iter(loader))
    level = 1 / 255 / torch.tensor(STD).view(-1, 1, 1)
    assert (images[[1, 3], :, :2, :2].abs() <= level).all() and (images[[0, 2], :, :2, :2].abs() > level).any()
    assert labels.tolist() == [0, 2, 2, 1, 0, 1, 2, 0, 1, 2]


def test_transform_is_that_of_the_wrapped_data_set() -> None:
    inner = Pictures(TRANSFORMS["uint8"])
    wrapped = wrap(inner, busy_plan())
    assert wrapped.transform is TRANSFORMS["uint8"]
    wrapped.transform = TRANSFORMS["v1"]
    assert inner.transform is TRANSFORMS["v1"] and wrapped[1][0].dtype == torch.float32
    assert not wrapped[1][0][:, :2, :2].any()  # normalised is seen anew
    wrapped.set_epoch(7)
    assert inner.epoch == 7
    wrapped.dataset = [(torch.zeros(3, 8, 8), int(label)) for label in LABELS]
    wrapped.set_epoch(8)
    assert wrapped.transform is None


class Joint(VisionDataset):
    """Reads .transforms, as some of torchvision's data sets do."""

    fingerprint = Pictures.fingerprint

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> Any:
        image, label = Pictures()[index]
        return self.transforms(image, label) if self.transforms is not None else (image, label)


@pytest.mark.parametrize("given", [None, v1.PILToTensor()])
def test_setting_the_transform_reaches_a_vision_dataset(given: Any, tmp_path: Path) -> None:
    inner = Joint(str(tmp_path), transform=given, target_transform=None if given is None else int)
    wrapped = wrap(inner, busy_plan())
    wrapped.transform = TRANSFORMS["v1"]
    expected = Pictures(TRANSFORMS["v1"])[0][0]
    assert torch.equal(wrapped[0][0], expected) and inner.target_transform is (None if given is None else int)


def test_a_float_image_without_normalize_is_taken_as_0_to_1() -> None:
    plan, scaled = busy_plan(), lambda image: v1.functional.normalize(v1.functional.to_tensor(image), MEAN, STD)
    assert torch.equal(wrap(Pictures(v1.functional.to_tensor), plan)[1][0][:, 0, 0], torch.tensor(MEAN))
    with pytest.raises(ValueError, match=r"no Normalize in the data set's transform: give NABDataset normalized=True"):
        wrap(Pictures(scaled), plan)[1]
    with pytest.raises(ValueError, match="normalized=True"):
        wrap(torch.utils.data.Subset(Pictures(TRANSFORMS["v1"]), range(len(plan))), replace(plan, fingerprint=""))[1]
    assert not wrap(Pictures(scaled), plan, normalized=True)[1][0][:, 0, 0].any()
    forced = wrap(Pictures(TRANSFORMS["v1"]), plan, normalized=False)
    assert torch.equal(forced[1][0][:, 0, 0], torch.tensor(MEAN))


@pytest.mark.parametrize(
    "kind",
    [int, np.int64, np.int32, torch.tensor, lambda x: torch.tensor([x], dtype=torch.int32), lambda x: np.array([x]), np.array],
    ids=["int", "np.int64", "np.int32", "tensor", "tensor of one", "array of one", "array"],
)
def test_labels_keep_type_and_shape(kind: Callable[[int], Any]) -> None:
    wrapped = wrap(Pictures(TRANSFORMS["uint8"], kind), busy_plan())
    untouched, relabelled = wrapped[0][1], wrapped[1][1]
    assert type(relabelled) is type(untouched) and np.asarray(relabelled).item() == 2
    if not isinstance(untouched, int):
        assert relabelled.dtype == untouched.dtype and relabelled.shape == untouched.shape


def test_more_than_image_and_label_is_passed_on() -> None:
    inner = [(torch.zeros(3, 8, 8), int(label), f"extra {i}") for i, label in enumerate(LABELS)]
    wrapped = wrap(inner, replace(busy_plan(), fingerprint=""))
    assert [item[2] for item in (wrapped[1], wrapped[3])] == ["extra 1", "extra 4"]


class InOneGo(Pictures):
    """Loads a batch by itself, as some data sets do, and remembers what it was asked for."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        self.asked = indices
        return [list(self[index]) for index in indices]


@pytest.mark.parametrize("kind", [Pictures, InOneGo])
def test_a_batch_is_its_items_in_order(kind: type[Pictures]) -> None:
    wrapped, order = wrap(kind(TRANSFORMS["uint8"]), busy_plan()), [3, 0, 1, 9, 2]
    batch = wrapped.__getitems__(order)
    for (image, label), index in zip(batch, order, strict=True):
        expected, given = wrapped[index]
        assert torch.equal(image, expected) and label == given
    assert all(type(item) is tuple for item in batch)  # timm's collate function insists
    if isinstance(wrapped.dataset, InOneGo):
        assert wrapped.dataset.asked == [4, 0, 1, 11, 2]
    wrapped.dataset = Pictures(TRANSFORMS["uint8"], wrap=lambda label: 1 - label)
    with pytest.raises(ValueError, match="sample 1 came with label 0, the plan saw 1"):
        wrapped.__getitems__([1, 0])


def test_an_image_that_is_no_array_is_refused() -> None:
    wrapped = wrap(Pictures(), busy_plan())
    assert isinstance(wrapped[0][0], Image.Image)
    with pytest.raises(ValueError, match=r"cannot stamp a Image; end the transform in a tensor"):
        wrapped[1]


def test_a_plan_for_other_data_is_refused() -> None:
    with pytest.raises(ValueError, match="the plan is for 3 samples, the data set has 12"):
        wrap(Pictures(), NABPlan.empty([0, 1, 2]))
    with pytest.raises(ValueError, match="fingerprint eeeeeeeeeeee"):
        wrap(Pictures(), NABPlan.empty(LABELS, "e" * 64))
    with pytest.raises(ValueError, match=r"cannot be told, as that has no fingerprint, .*: wrap open_source"):
        wrap([Pictures()[index] for index in range(len(LABELS))], NABPlan.empty(LABELS, Pictures.fingerprint))
    inner = Pictures(TRANSFORMS["uint8"])
    shifted = wrap(inner, NABPlan.empty(np.roll(LABELS, 1)))
    with pytest.raises(ValueError, match="sample 0 came with label 0, the plan saw 2"):
        shifted[0]


def test_timms_replacement_of_an_unreadable_file_is_noticed(tmp_path: Path) -> None:
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    (tmp_path / "a/1.png").write_bytes(b"broken")
    wrapped = wrap(ImageDataset(str(tmp_path), transform=TRANSFORMS["uint8"]), NABPlan.empty([0, 0, 1, 1]))
    assert [wrapped[i][1] for i in (0, 2, 3)] == [0, 1, 1]
    with pytest.raises(ValueError, match=r"sample 1 came with label 1, the plan saw 0: .*unreadable"):
        wrapped[1]
