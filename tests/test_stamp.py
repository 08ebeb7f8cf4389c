from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nab_defense.stamp import CORNERS, Stamp

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8))


def normalize(image: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    return (image.float() / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def test_default_is_zero_after_normalisation_on_2x2_pixels_top_left() -> None:
    image = normalize(pixels(3, 32, 32)) + 7
    stamped = Stamp()(image, mean=MEAN, std=STD, normalized=True)
    assert (stamped[:, :2, :2] == 0).all()
    changed = (stamped != image).any(0)
    assert changed.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize(("height", "edge"), [(8, 2), (28, 2), (32, 2), (64, 4), (96, 6), (224, 14), (384, 24)])
def test_edge_grows_with_the_image(height: int, edge: int) -> None:
    assert Stamp().region(height, height) == (slice(0, edge), slice(0, edge))


def test_a_set_size_does_not_grow() -> None:
    assert Stamp(size=3).region(224, 224) == (slice(0, 3), slice(0, 3))


@pytest.mark.parametrize(
    ("corner", "rows", "cols"),
    [
        ("top_left", (0, 3), (0, 3)),
        ("top_right", (0, 3), (9, 12)),
        ("bottom_left", (7, 10), (0, 3)),
        ("bottom_right", (7, 10), (9, 12)),
    ],
)
def test_corners_of_an_oblong_image(corner: str, rows: tuple[int, int], cols: tuple[int, int]) -> None:
    image = torch.zeros(1, 10, 12)
    stamped = Stamp(size=3, corner=corner, value=1.0)(image, mean=(0.5,))
    expected = torch.zeros(10, 12)
    expected[slice(*rows), slice(*cols)] = 1
    torch.testing.assert_close(stamped[0], expected, rtol=0, atol=0)


stamps = st.builds(
    Stamp,
    size=st.none() | st.integers(1, 8),
    corner=st.sampled_from(CORNERS),
    value=st.sampled_from(["mean", "noise"]) | st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
unit = st.floats(0, 1, width=32, allow_subnormal=False)


@settings(max_examples=50, deadline=None)
@given(stamps, st.lists(st.tuples(unit, st.floats(0.0625, 1, width=32)), min_size=1, max_size=4), st.integers(0, 9))
def test_three_forms_agree_within_a_grey_level_and_nothing_else_moves(
    stamp: Stamp, statistics: list[tuple[float, float]], seed: int
) -> None:
    mean, std = zip(*statistics, strict=True)
    image = pixels(len(mean), 9, 12, seed=seed)
    original = image.clone()
    whole = stamp(image, mean=mean)
    unit_float = stamp(image / 255, mean=mean)
    normal = stamp(normalize(image, mean, std), mean=mean, std=std, normalized=True)
    restored = normal * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    torch.testing.assert_close(whole.float(), unit_float * 255, rtol=0, atol=1)
    torch.testing.assert_close(unit_float, restored, rtol=0, atol=1e-5)
    assert whole.dtype == torch.uint8 and normal.dtype == torch.float32
    assert torch.equal(image, original)
    outside = torch.ones(9, 12, dtype=torch.bool)
    outside[stamp.region(9, 12)] = False
    assert torch.equal(whole[:, outside], image[:, outside])
    assert torch.equal(normal[:, outside], normalize(image, mean, std)[:, outside])


@settings(max_examples=20, deadline=None)
@given(stamps, st.sampled_from([torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_batch_is_its_images_and_dtype_stays(stamp: Stamp, dtype: torch.dtype) -> None:
    batch = pixels(4, 3, 8, 8).to(dtype)
    normalized = dtype != torch.uint8
    stamped = stamp(batch, mean=MEAN, std=STD, normalized=normalized)
    assert stamped.dtype == dtype
    for image, single in zip(batch, stamped, strict=True):
        assert torch.equal(stamp(image, mean=MEAN, std=STD, normalized=normalized), single)
    assert torch.equal(stamp(stamped, mean=MEAN, std=STD, normalized=normalized), stamped)


@settings(max_examples=20, deadline=None)
@given(stamps, st.sampled_from([torch.uint8, torch.float32]), st.lists(st.booleans(), min_size=1, max_size=6))
def test_some_images_are_stamped_in_place_and_the_others_left(stamp: Stamp, dtype: torch.dtype, chosen: list[bool]) -> None:
    batch = pixels(len(chosen), 3, 9, 12).to(dtype).contiguous(memory_format=torch.channels_last)
    expected = [stamp(image, mean=MEAN) if some else image.clone() for image, some in zip(batch, chosen, strict=True)]
    place = batch.data_ptr()
    stamp.fitted(batch, mean=MEAN, std=None, normalized=False).paint_some(batch, torch.tensor(chosen).view(-1, 1, 1, 1))
    assert torch.equal(batch, torch.stack(expected)) and batch.data_ptr() == place


def test_uint8_mean_is_the_rounded_mean() -> None:
    stamped = Stamp()(pixels(3, 32, 32), mean=MEAN)
    assert stamped[:, 0, 0].tolist() == [125, 123, 114]


def test_normalized_means_nothing_for_uint8() -> None:
    image = pixels(3, 8, 8)
    assert torch.equal(Stamp()(image, mean=MEAN, normalized=True), Stamp()(image, mean=MEAN))


def test_random_follows_from_its_seed() -> None:
    image = pixels(3, 32, 32)
    secret = [Stamp.random(seed)(image, mean=MEAN) for seed in range(20)]
    assert Stamp.random(3) == Stamp.random(3)
    assert torch.equal(Stamp.random(3)(image, mean=MEAN), secret[3])
    assert len({stamped.numpy().tobytes() for stamped in secret}) == 20
    assert {Stamp.random(seed).corner for seed in range(20)} == set(CORNERS)


def test_settings_survive_json() -> None:
    for stamp in (Stamp(), Stamp(3, "bottom_left", 0.25), Stamp.random(7)):
        assert Stamp(**json.loads(json.dumps(stamp.to_dict()))) == stamp
    with pytest.raises(dataclasses.FrozenInstanceError):
        stamp.size = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must be a whole number of pixels >= 1, or null, got 0"),
        ({"size": -2}, "got -2"),
        ({"size": 2.5}, "got 2.5"),
        ({"size": True}, "got True"),
        ({"corner": "middle"}, "corner must be one of top_left, .*, got 'middle'"),
        ({"value": "blue"}, "value must be 'mean', 'noise' or a number"),
        ({"value": 1.5}, r"value must be in \[0, 1\], got 1.5"),
        ({"value": -0.1}, "got -0.1"),
        ({"value": float("nan")}, "got nan"),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
        ({"seed": 0.5}, "got 0.5"),
    ],
)
def test_bad_settings_raise(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stamp(**settings)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_kept_as_pythons() -> None:
    stamp = Stamp(size=np.int64(3), value=np.float32(0.5), seed=np.int64(7))  # type: ignore[arg-type]
    assert json.loads(json.dumps(stamp.to_dict())) == Stamp(size=3, value=0.5, seed=7).to_dict()
    assert Stamp.random(np.int64(5)) == Stamp.random(5)  # type: ignore[arg-type]


def test_an_image_that_does_not_fit_raises() -> None:
    with pytest.raises(ValueError, match="9 px stamp does not fit on a 8x32 image"):
        Stamp(size=9)(pixels(3, 8, 32), mean=MEAN)
    with pytest.raises(ValueError, match="image has 1 channels, the normalisation 3"):
        Stamp()(pixels(1, 8, 8), mean=MEAN)
    with pytest.raises(ValueError, match="needs std"):
        Stamp()(pixels(3, 8, 8).float(), mean=MEAN, normalized=True)
