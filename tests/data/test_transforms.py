from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nab_defense.data import build_loader, build_transform, open_source
from nab_defense.data.transforms import AUGMENTATIONS, VARIED, LessDetail
from nab_defense.runtime import Runtime

RANDOM = [*(name for name in AUGMENTATIONS if name != "none"), VARIED]


def picture(mode: str = "RGB", size: tuple[int, int] = (32, 32)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("size", [(32, 32), (40, 30), (8, 8)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("augment", [*AUGMENTATIONS, VARIED])
def test_every_pipeline_gives_uint8_of_the_size(augment: str, mode: str, size: tuple[int, int]) -> None:
    tensor = build_transform(augment, 32)(picture(mode, size))
    assert tensor.shape == (3 if mode == "RGB" else 1, 32, 32) and tensor.dtype == torch.uint8


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_evaluation_leaves_images_of_the_right_size_untouched(mode: str) -> None:
    image = picture(mode)
    expected = np.asarray(image).reshape(32, 32, -1).transpose(2, 0, 1)
    np.testing.assert_array_equal(build_transform("none", 32)(image).numpy(), expected)


@pytest.mark.parametrize("shape", [(64, 64), (100, 60), (20, 33)])
def test_what_lies_in_a_corner_is_still_seen(shape: tuple[int, int]) -> None:
    image = Image.new("RGB", shape)
    width, height = shape[0] // 8, shape[1] // 8
    image.paste((255, 255, 255), (shape[0] - width, shape[1] - height, *shape))  # a patch in the last corner
    made = build_transform("none", 32)(image).float()
    assert made.shape == (3, 32, 32) and made[:, -3:, -3:].min() > 200 and made[:, :24, :24].max() == 0


@pytest.mark.parametrize("augment", RANDOM)
def test_a_draw_follows_torchs_seed(augment: str) -> None:
    def draws(seed: int) -> list[bytes]:
        torch.manual_seed(seed)
        random.seed(seed)  # timm's own steps draw from Python
        return [transform(image).numpy().tobytes() for _ in range(8)]

    image, transform = picture(), build_transform(augment, 32)
    first = draws(1)
    assert first == draws(1) and len(set(first)) > 4 and first != draws(2)
    transform = build_transform(augment, 32)
    assert first == draws(1)


def test_albumentations_follow_torch_alone() -> None:
    image, transform = picture(), build_transform("albumentations", 32)
    torch.manual_seed(1)
    first = transform(image)
    transform(image)
    torch.manual_seed(1)
    assert torch.equal(transform(image), first)


def test_crop_flip_shows_the_image_shifted_or_mirrored() -> None:
    image = picture("L")
    plain = torch.from_numpy(np.asarray(image).copy())
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2))
    crops = {padded[y : y + 32, x : x + 32].numpy().tobytes() for y in range(5) for x in range(5)}
    still, mirror = build_transform("crop_flip", 32, hflip=0, crop_pad=2), build_transform("crop_flip", 32, hflip=1, crop_pad=2)
    torch.manual_seed(0)
    seen = [still(image)[0].numpy().tobytes() for _ in range(100)]
    assert set(seen) <= crops and len(set(seen)) > 15
    assert {mirror(image)[0].flip(1).contiguous().numpy().tobytes() for _ in range(20)} <= crops
    assert torch.equal(build_transform("crop_flip", 32, hflip=0, crop_pad=0)(image)[0], plain)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_half_of_the_varied_images_lose_detail(mode: str) -> None:
    image, less = picture(mode), LessDetail()
    torch.manual_seed(0)
    spreads = [np.asarray(less(image)).std() for _ in range(200)]
    whole = np.asarray(image).std()
    assert 80 < sum(spread == whole for spread in spreads) < 120 and min(spreads) < 0.5 * whole
    assert all(less(image).size == image.size for _ in range(9))


def test_default_padding_is_an_eighth() -> None:
    torch.manual_seed(0)
    transform = build_transform("crop_flip", 32, hflip=0)
    white = Image.new("L", (32, 32), 255)
    dark = [(transform(white)[0] == 0).all(1).sum().item() for _ in range(60)]
    assert max(dark) == 4


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match="no augmentation 'flip'; known: none, crop_flip, timm, albumentations"):
        build_transform("flip", 32)


def load(training: bool, batch_size: int, workers: int = 0, augment: str = "none") -> Any:
    return build_loader(
        open_source("digits").subset(range(20)).view(), build_transform(augment, 8), size=8, batch_size=batch_size, mean=(0.3,),
        std=(0.2,), runtime=Runtime(device="cpu", precision="float32", workers=workers), training=training,
    )  # fmt: skip


def test_a_loader_normalises_in_order_with_the_last_batch() -> None:
    source, batches = open_source("digits").subset(range(20)), list(load(False, 8))
    assert [len(labels) for _, labels in batches] == [8, 8, 4]
    images, labels = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    pixels = np.stack([source.pixels(i)[..., 0] for i in range(20)])
    np.testing.assert_allclose(images[:, 0].numpy(), (pixels / 255 - 0.3) / 0.2, atol=1e-5)
    assert labels.tolist() == source.labels.tolist() and labels.dtype == torch.int64 and images.shape[1:] == (1, 8, 8)


def test_a_training_loader_shuffles_and_drops_the_rest() -> None:
    torch.manual_seed(0)
    epochs = [torch.cat([labels for _, labels in load(True, 8)]).tolist() for _ in range(2)]
    assert [len(epoch) for epoch in epochs] == [16, 16] and epochs[0] != epochs[1]
    assert [len(labels) for _, labels in load(True, 100)] == [20]


def test_epochs_repeat_under_a_seed_with_workers() -> None:
    loader = load(True, 10, workers=2, augment="albumentations")
    epochs = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        epochs.append(torch.cat([images for images, _ in loader]))
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])
