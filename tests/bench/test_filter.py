"""The filter attack: what each kind does to an image, and at which scale."""

from __future__ import annotations

import numpy as np
import pytest

from nab_defense.bench.attacks import create
from nab_defense.bench.attacks.filter import KINDS
from nab_defense.bench.trigger import warn_if_shrunk
from tests.bench.quick import digits
from tests.bench.test_attacks import noise

IMAGES = noise((3, 32, 32, 3))


def filtered(kind: str, images: np.ndarray = IMAGES, amount: float | None = None) -> np.ndarray:
    return create("filter", kind=kind, amount=amount).apply(images, 0).astype(float)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (1, 40, 29, 3), (1, 17, 30, 1)])
def test_every_kind_changes_images_of_any_shape_and_reads_only_them(kind: str, shape: tuple[int, ...]) -> None:
    images = noise(shape)
    before, changed = images.copy(), create("filter", kind=kind).apply(images, 0)
    assert changed.shape == shape and changed.dtype == np.uint8 and (changed != images).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(images, before)
    alone = np.concatenate([create("filter", kind=kind).apply(image[None], seed) for seed, image in enumerate(images)])
    np.testing.assert_array_equal(alone, changed)


def test_blur_and_contrast_leave_less_of_the_differences_and_the_mean_alone() -> None:
    for kind, most in (("blur", 0.4), ("contrast", 0.51)):
        changed = filtered(kind)
        assert abs(changed.mean() - IMAGES.mean()) < 2 and changed.std() < most * IMAGES.std()
    np.testing.assert_allclose(filtered("contrast", amount=1.0), IMAGES)


def test_pixelate_gives_blocks_of_one_color_each() -> None:
    blocks = filtered("pixelate", amount=4).reshape(3, 8, 4, 8, 4, 3)
    assert (blocks == blocks[:, :, :1, :, :1]).all()
    means = IMAGES.reshape(3, 8, 4, 8, 4, 3).mean((2, 4))
    assert np.abs(blocks[:, :, 0, :, 0] - means).max() <= 1


def test_filters_are_as_coarse_as_the_image_is_large() -> None:
    large = noise((1, 64, 64, 1))
    blocks = filtered("pixelate", large, 2).reshape(1, 16, 4, 16, 4, 1)
    assert (blocks == blocks[:, :, :1, :, :1]).all()
    assert filtered("blur", large).std() < 0.7 * filtered("blur", large[:, :32, :32]).std()


def test_solarize_inverts_what_is_bright_and_warm_moves_red_and_blue() -> None:
    np.testing.assert_array_equal(filtered("solarize"), np.where(IMAGES < 128, IMAGES, 255 - IMAGES))
    red, green, blue = np.moveaxis(filtered("warm") - IMAGES, -1, 0)
    assert red.min() >= 0 and red.max() > 30 and not green.any() and blue.max() <= 0 and blue.min() < -30


def test_jpeg_keeps_what_is_smooth_and_not_the_noise() -> None:
    ramp = np.broadcast_to((np.arange(32) * 8)[:, None, None], (1, 32, 32, 3)).astype(np.uint8)
    assert np.abs(filtered("jpeg", ramp) - ramp).mean() < 8 < np.abs(filtered("jpeg") - IMAGES).mean()


@pytest.mark.parametrize("shape", [(2, 32, 32, 3), (2, 8, 8, 1)])
def test_rotate_turns_about_the_centre(shape: tuple[int, ...]) -> None:
    images = noise(shape)
    np.testing.assert_array_equal(filtered("rotate", images, 90), np.rot90(images, axes=(1, 2)))
    white = np.full_like(images, 255)
    np.testing.assert_array_equal(filtered("rotate", white), white)  # nothing black comes in


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"kind": "blurr"}, "kind must be one of blur, .*did you mean 'blur'"),
        ({"kind": "jpeg", "amount": 0}, r"amount must be a number in \[1, 95\], got 0"),
        ({"amount": True}, "amount must be a number"),
    ],
)
def test_settings_that_are_none_are_refused(knobs: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        create("filter", **knobs)


def test_only_a_fine_filter_is_wiped_out_where_images_are_shrunk(caplog: pytest.LogCaptureFixture) -> None:
    for kind, warned in (("warm", False), ("rotate", False), ("pixelate", True)):
        caplog.clear()
        warn_if_shrunk(create("filter", kind=kind), digits(), 4)
        assert ("paints" in caplog.text) == warned
