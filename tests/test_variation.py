"""How images vary: the directions, and what of a pattern lies beyond them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nab_defense import variation as room
from nab_defense.variation import EXPLAINED, beyond_variation, reduced, variation

NOBODY = np.zeros(600, bool)


def images(count: int = 200) -> tuple[torch.Tensor, np.ndarray]:
    """Three classes, each of which varies in one pixel of its own, and hardly in the others."""
    labels = np.repeat(np.arange(3), count)
    made = 0.01 * torch.randn(3 * count, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    for label in range(3):
        made[labels == label, 0, 0, label] += torch.randn(count, generator=torch.Generator().manual_seed(label))
    return made, labels


def batches(made: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(part, torch.zeros(len(part))) for part in made.split(size)]


def test_the_directions_of_a_class_are_those_of_the_others() -> None:
    made, labels = images()
    directions = variation(batches(made, 64), labels, NOBODY)
    assert list(directions) == [0, 1, 2]
    for label, rows in directions.items():
        torch.testing.assert_close(rows @ rows.T, torch.eye(2))  # two others, a direction each
        assert rows[:, label].abs().max() < 0.05
    pattern = torch.ones(1, 1, 2, 3)
    (rest,) = beyond_variation(pattern, [1], directions)
    np.testing.assert_allclose(rest.flatten(), [0, 1, 0, 1, 1, 1], atol=0.1)
    both = beyond_variation(pattern.expand(2, 1, 2, 3), [1, 2], directions)
    torch.testing.assert_close(both[0], rest)
    np.testing.assert_allclose(both[1].flatten(), [0, 0, 1, 1, 1, 1], atol=0.1)


def test_they_hold_nine_tenths_of_the_variance_and_no_more_than_that_takes() -> None:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(300, 1, 2, 3, generator=generator) * torch.tensor([6.0, 5, 4, 3, 2, 1]).view(1, 2, 3)
    rows = variation(batches(made, 300), np.repeat([0, 1], [10, 290]), np.zeros(300, bool))[0].double()
    values = made[10:].flatten(1).double()
    held = ((values - values.mean(0)) @ rows.T).square().sum(0) / (values - values.mean(0)).square().sum()
    assert held.sum() >= EXPLAINED > held[:-1].sum()


def test_of_each_class_as_many_are_looked_at_always_the_same_ones_and_nobody_who_is_accused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, labels, aside = images()[0], np.repeat([0, 1, 2], [450, 140, 10]), np.arange(600) >= 595
    monkeypatch.setattr(room, "SAMPLE", 300)
    monkeypatch.setattr(room, "_directions", lambda some: some)
    one, other = variation(batches(made, 7), labels, aside), variation(batches(made, 600), labels, aside)
    assert {label: len(rows) for label, rows in one.items()} == {0: 100 + 5, 1: 100 + 5, 2: 100 + 100}
    for label in range(3):
        torch.testing.assert_close(one[label], other[label])
    assert not any((made[595:].flatten(1)[:, None] == rows.float()).all(2).any() for rows in one.values())


def test_of_few_others_nothing_is_known_and_of_a_pattern_of_their_class_nothing_is_left() -> None:
    made, labels = images()[0], np.repeat([0, 1], [501, 99])
    directions = variation(batches(made, 64), labels, NOBODY)
    assert list(directions) == [1]
    rest = beyond_variation(torch.ones(2, 1, 2, 3), [0, 1], directions)
    assert not rest[0].any() and rest[1].any()


def test_of_large_images_what_is_coarse_is_taken_off_and_a_small_patch_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    waves = torch.linspace(0, 6, 80).sin().view(1, 1, 1, 80).expand(1, 1, 64, 80)
    made = torch.randn(300, 1, 1, 1, generator=generator) * waves + 0.01 * torch.randn(300, 1, 64, 80, generator=generator)
    directions = variation(batches(made, 64), np.repeat([0, 1], 150), np.zeros(300, bool))
    assert reduced(made).shape == (300, 1, 32, 32) and reduced(made[:, :, :20, :20]).shape == (300, 1, 20, 20)
    patch = torch.zeros(1, 1, 64, 80)
    patch[..., 60:, 76:] = 2
    rest = beyond_variation(waves + patch, [0], directions)
    assert (rest - patch).abs().max() < 0.25 and (rest - patch).square().mean() < 0.01 * waves.square().mean()


def test_images_that_do_not_vary_take_one_direction_at_most() -> None:
    directions = variation(batches(torch.ones(200, 1, 2, 2), 20), np.repeat([0, 1], 100), np.zeros(200, bool))
    assert [rows.shape for rows in directions.values()] == [(1, 4)] * 2
    assert all(rows.isfinite().all() for rows in directions.values())
