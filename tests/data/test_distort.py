"""Each distortion by its law: torchvision's, image by image, and the distribution of its draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import transforms as tv
from torchvision.transforms import functional as tf

from nab_defense.data.distort import AREA, Distortion, adjusted, distorted, draw_holes, erased


def pixels(count: int, channels: int = 3, edge: int = 16) -> Tensor:
    shape = (count, channels, edge, edge)
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_colors_are_torchvisions_with_each_images_factors(channels: int) -> None:
    images = pixels(64, channels)
    images[:2], images[2:4] = 0, 255
    factors = 2 * torch.rand(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factors[:, ::7] = 1
    made = adjusted(images, factors)
    for image, own, (brightness, contrast, saturation) in zip(images, made, factors.T.tolist(), strict=True):
        expected = tf.adjust_contrast(tf.adjust_brightness(image, brightness), contrast)
        assert torch.equal(own, tf.adjust_saturation(expected, saturation))
    assert torch.equal(made[::7], images[::7]) and torch.equal(images[2:4], torch.full_like(images[2:4], 255))


def test_factors_are_even_between_their_bounds_and_independent() -> None:
    torch.manual_seed(0)
    factors, holes = Distortion(0.4).draw(20_000, 16)
    assert factors.shape == (3, 20_000) and holes.shape == (0, 20_000)
    assert 0.6 <= factors.min() < 0.601 and 1.399 < factors.max() <= 1.4
    for row in factors:
        shares = torch.histc(row.float(), 8, 0.6, 1.4) / 20_000
        torch.testing.assert_close(shares, torch.full((8,), 1 / 8), rtol=0, atol=0.01)
    assert (torch.corrcoef(factors) - torch.eye(3)).abs().max() < 0.03


@pytest.mark.parametrize("edge", [8, 16])
def test_a_rectangle_turns_black_and_the_rest_stays(edge: int) -> None:
    torch.manual_seed(0)
    images = pixels(500, edge=edge).clamp_(min=1)
    holes = draw_holes(500, edge, probability=1.0)
    made = erased(images.clone(), holes)
    for image, own, (top, left, height, width) in zip(images, made, holes.T.tolist(), strict=True):
        assert 0 <= top <= edge - height and 0 <= left <= edge - width and 1 <= height < edge and 1 <= width < edge
        expected = image.clone()
        expected[:, top : top + height, left : left + width] = 0
        assert torch.equal(own, expected)


def test_rectangles_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(0)
    top, left, height, width = draw_holes(6000, 32, probability=1.0).double()
    share = height * width / 32**2
    assert AREA[0] - 0.01 < share.min() < share.max() < AREA[1] + 0.03  # edges are whole pixels
    blank = torch.zeros(1, 32, 32)
    params = [tv.RandomErasing.get_params(blank, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(6000)]
    theirs = torch.tensor(params, dtype=torch.float64)
    for own, other in zip((top, left, height, width, share), (*theirs.T, theirs[:, 2] * theirs[:, 3] / 32**2), strict=True):
        levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
        own_levels, other_levels = torch.quantile(own, levels), torch.quantile(other, levels)
        torch.testing.assert_close(own_levels, other_levels, rtol=0.05, atol=1.01 if own is not share else 0.01)


def test_so_many_are_erased_as_told() -> None:
    torch.manual_seed(0)
    for probability in (0.0, 0.3, 1.0):
        holes = draw_holes(5000, 32, probability=probability)
        assert (holes[2] > 0).double().mean().item() == pytest.approx(probability, abs=0.02 * (0 < probability < 1))
    assert (draw_holes(50, 1, probability=1.0)[2] == 0).all()  # no rectangle is smaller than such an image


def test_what_is_off_draws_nothing_and_changes_nothing() -> None:
    images, generator = pixels(8), torch.Generator().manual_seed(3)
    before = generator.get_state()
    factors, holes = Distortion().draw(8, 16, generator)
    assert torch.equal(generator.get_state(), before) and factors.shape == (0, 8) and holes.shape == (0, 8)
    assert distorted(images, factors, holes) is images and torch.equal(images, pixels(8))


def test_the_seed_decides_and_one_image_is_a_batch_of_one() -> None:
    both, image = Distortion(0.4, 0.7), pixels(1)[0]
    made = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        made.append(both.one(image))
    torch.manual_seed(5)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2]) and torch.equal(image, pixels(1)[0])
    assert torch.equal(made[0], distorted(image[None].clone(), *both.draw(1, 16))[0])
