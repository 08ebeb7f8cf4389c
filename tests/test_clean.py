"""CleanSet: batches, augmentation, splits; and the universal perturbations' arithmetic."""

from __future__ import annotations

import torch
from torch import nn

from nab_defense.changes import boxed, climbed, projected
from nab_defense.clean import CleanSet, Pixels, logits_of, mixed
from nab_defense.runtime import Runtime

CPU = Runtime(device="cpu")


def numbered(count: int, classes: int = 2) -> CleanSet:
    """Images whose every pixel is the image's number."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    return CleanSet(images, torch.arange(count) % classes, pad=1)


def test_batches_cover_the_set_once_and_match_their_rows() -> None:
    clean = numbered(50)
    for seed in (None, 3):
        batches = list(clean.batches(16, runtime=CPU, seed=seed))
        rows = torch.cat([rows for _, rows in batches])
        assert sorted(rows.tolist()) == list(range(50))
        assert (rows == torch.arange(50)).all().item() is (seed is None)
        for images, picked in batches:
            torch.testing.assert_close(images[:, 0, 4, 4], picked / 255)
    assert [len(rows) for _, rows in clean.batches(16, runtime=CPU)] == [16, 16, 18]  # a last batch of 2 joins


def test_augmented_batches_are_crops_and_flips_of_their_images_and_follow_the_seed() -> None:
    images = torch.randint(1, 256, (6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clean = CleanSet(images, pad=2)
    padded = torch.nn.functional.pad(images, (2,) * 4).float() / 255
    crops = [(n, padded[n, :, top : top + 8, left : left + 8]) for n in range(6) for top in range(5) for left in range(5)]
    views = {(n, view.contiguous().numpy().tobytes()) for n, crop in crops for view in (crop, crop.flip(2))}
    made, rows = next(iter(clean.batches(6, runtime=CPU, seed=1, augment=True)))
    assert {(int(n), image.contiguous().numpy().tobytes()) for image, n in zip(made, rows, strict=True)} <= views
    again = next(iter(clean.batches(6, runtime=CPU, seed=1, augment=True)))[0]
    assert torch.equal(again, next(iter(clean.batches(6, runtime=CPU, seed=1, augment=True)))[0])
    assert not torch.equal(again, next(iter(clean.batches(6, runtime=CPU, seed=2, augment=True)))[0])


def test_repeats_are_rows_of_equal_images() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    repeated = CleanSet(images[[0, 1, 0, 2, 1, 3]], torch.arange(6))
    assert repeated.distinct().tolist() == [0, 1, 3, 5]


def test_split_leaves_one_of_a_rare_class_in_the_first_part() -> None:
    labels = torch.tensor([0] * 50 + [1] * 52 + [2] * 2)
    clean = CleanSet(torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), labels)
    for share in (0.2, 0.8, 0.99):
        for part in clean.split(share, seed=0):
            assert part.labels is not None and part.labels.bincount(minlength=3).min() >= 1


def test_split_is_disjoint_and_keeps_the_classes_in_proportion() -> None:
    first, second = numbered(100, classes=4).split(0.2, seed=0)
    assert sorted([*first.images[:, 0, 0, 0].tolist(), *second.images[:, 0, 0, 0].tolist()]) == list(range(100))
    assert second.labels is not None and second.labels.bincount().tolist() == [5, 5, 5, 5]


def test_split_leaves_images_in_both_parts_where_classes_have_one() -> None:
    first, second = numbered(100, classes=100).split(0.15, seed=0)
    assert (len(first), len(second)) == (85, 15)


def test_pixels_normalises_and_logits_are_of_changed_and_clipped_images() -> None:
    clean = numbered(5)
    network = Pixels(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), [0.5] * 3, [0.25] * 3)
    torch.testing.assert_close(logits_of(network, clean, CPU)[:, 0], (torch.arange(5) / 255 - 0.5) / 0.25)
    assert (logits_of(network, clean, CPU, lambda images: images * 0 + 1) == 2).all()


def test_boxed_clips_and_passes_the_gradient_everywhere() -> None:
    pixels = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5], requires_grad=True)
    boxed(pixels).sum().backward()
    assert boxed(pixels).tolist() == [0, 0, 0.5, 1, 1] and pixels.grad is not None and pixels.grad.tolist() == [1] * 5


def test_projection_and_ascent_stay_in_the_ball_and_reach_the_best_point() -> None:
    goal = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert projected(goal, 100.0) is not goal and torch.equal(projected(goal, 100.0), goal)
    torch.testing.assert_close(projected(torch.stack([goal, goal / 1e3]), 2.0)[0].norm(), torch.tensor(2.0))
    change = torch.zeros(3, 4, 4)
    for _ in range(20):
        change = climbed(change, goal, step=0.3, radius=2.0)
    torch.testing.assert_close(change, 2 * goal / goal.norm())


def test_a_mixture_shows_a_rectangle_of_another_image() -> None:
    images = torch.arange(500.0).view(500, 1, 1, 1).expand(500, 3, 6, 8)
    made = mixed(images, torch.Generator().manual_seed(0))
    other = made != images
    assert torch.equal(other[:, 0], other[:, 2]) and made.shape == images.shape
    shares = []
    for image, strange in zip(made[:, 0], other[:, 0], strict=True):
        rows, columns = strange.any(1), strange.any(0)
        assert torch.equal(strange, rows[:, None] & columns) and image.unique().numel() <= 2
        for line in (rows, columns):
            assert (line.int().diff() != 0).sum() <= 2  # in one piece
        shares.append(float(strange.float().mean()))
    assert min(shares) < 0.05 and max(shares) > 0.95 and 0.35 < sum(shares) / 500 < 0.65
    assert torch.equal(made, mixed(images, torch.Generator().manual_seed(0)))
