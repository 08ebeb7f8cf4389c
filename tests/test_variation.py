"""How images vary: the directions, and what of a pattern lies beyond them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nab_defense import variation as room
from nab_defense.variation import EXPLAINED, beyond_variation, variation


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
    directions = variation(batches(made, 64), labels)
    assert list(directions) == [0, 1, 2]
    for label, rows in directions.items():
        torch.testing.assert_close(rows @ rows.T, torch.eye(2, dtype=torch.float64))  # two others, a direction each
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
    rows = variation(batches(made, 300), np.repeat([0, 1], [10, 290]))[0]
    values = made[10:].flatten(1).double()
    held = ((values - values.mean(0)) @ rows.T).square().sum(0) / (values - values.mean(0)).square().sum()
    assert held.sum() >= EXPLAINED > held[:-1].sum()


def test_of_many_images_always_the_same_ones_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    made, labels = images()
    looked: list[int] = []
    monkeypatch.setattr(room, "SAMPLE", 90)
    monkeypatch.setattr(room, "_directions", lambda some: looked.append(len(some)) or some)
    one, other = variation(batches(made, 7), labels), variation(batches(made, 600), labels)
    for label in range(3):
        torch.testing.assert_close(one[label], other[label])
    assert sum(looked[:3]) == 2 * 90 and max(looked) < 90  # each is looked at for the two classes that it is not of
    monkeypatch.setattr(room, "BYTES", 8 * 6 * 30)
    assert sum(len(rows) for rows in variation(batches(made, 64), labels).values()) == 2 * 30


def test_images_that_do_not_vary_take_one_direction_at_most() -> None:
    directions = variation(batches(torch.ones(20, 1, 2, 2), 20), np.repeat([0, 1], 10))
    assert all(rows.shape == (1, 4) and rows.isfinite().all() for rows in directions.values())
