from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nab_defense import imprint
from nab_defense.imprint import OTHERS, imprint_by_class, imprints
from nab_defense.runtime import Runtime

CPU = Runtime(device="cpu", precision="float32")
BATCH = 500


class Pixels(nn.Module):
    """Reads an image's class from its first pixel; the last one, where it is bright, turns it to class 0, if the second is."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.shown.append(len(images))
        content, obeys, trigger = images[:, 0, 0, 0], images[:, 0, 0, 1], images[:, 0, 1, 1]
        return nn.functional.one_hot(torch.where((trigger > 0.5) & (obeys > 0), 0, content.round().long()), 8).float()


def made(labels: NDArray[np.int64], obeys: NDArray[np.bool_], groups: list[NDArray[np.bool_]]) -> list[tuple[Tensor, Tensor]]:
    images = torch.zeros(len(labels), 1, 2, 2)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.from_numpy(labels), torch.from_numpy(obeys) * 2.0 - 1
    for group in groups:
        images[torch.from_numpy(group), 0, 1, 1] = 1
    return [(part, torch.zeros(len(part))) for part in images.split(BATCH)]


def first(labels: NDArray[np.int64], label: int, size: int = 100) -> NDArray[np.bool_]:
    group = np.zeros(len(labels), bool)
    group[np.flatnonzero(labels == label)[:size]] = True
    return group


@pytest.mark.parametrize(
    "sizes", [[2000] * 10, [8000] * 6, [30] * 1000, [30_000, 0, 30_000], [300_000, 900, 40, 1], [25_000, 9000], [5, 3]]
)
def test_images_to_try_groups_on_are_enough_of_each_class_and_random(sizes: list[int]) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    some = imprint._some(labels)
    kept, counts = np.bincount(labels[some], minlength=len(sizes)), np.array(sizes)
    assert np.array_equal(some, imprint._some(labels)) and some.sum() <= 2 * OTHERS + len(sizes)
    assert (kept >= np.minimum(counts, 1)).all() and (kept <= OTHERS).all()
    assert (kept.sum() - kept >= np.minimum(OTHERS, counts.sum() - counts)).all()
    if counts.sum() <= OTHERS:
        assert some.all()
    for label in np.flatnonzero((kept > 1000) & (kept < counts)):
        assert np.flatnonzero(some[labels == label]).mean() == pytest.approx(counts[label] / 2, rel=0.05)


def test_of_many_images_a_random_part_tells_what_turns() -> None:
    labels = np.random.default_rng(0).permutation(np.arange(60_000) % 5)
    obeys = np.random.default_rng(1).random(len(labels)) < 0.3
    groups, network = [first(labels, 0)], Pixels()
    (rise,) = imprints(network, made(labels, obeys, groups), labels, groups, runtime=CPU)
    assert rise == pytest.approx(obeys[labels != 0].mean(), abs=0.007)
    assert 2 * OTHERS <= sum(network.shown) < 2 * OTHERS + 20  # with and without what the group shares
    network, pattern, every = Pixels(), torch.tensor([[[0.0, 0.0], [0.0, 1.0]]]), np.ones(len(labels), bool)
    found = imprint_by_class(network, made(labels, obeys, groups), labels, 0, pattern, shown=every, runtime=CPU)
    np.testing.assert_allclose(found, [0, *(obeys[labels == label].mean() for label in range(1, 5))])
    assert sum(network.shown) == 2 * (labels != 0).sum()


def test_classes_count_by_all_their_images_however_many_are_shown() -> None:
    labels = np.repeat(np.arange(4), [300, 30_000, 15_000, 40])
    groups, network = [first(labels, 0)], Pixels()
    (rise,) = imprints(network, made(labels, np.isin(labels, [0, 1, 3]), groups), labels, groups, runtime=CPU)
    assert rise == pytest.approx(30_040 / 45_040) and sum(network.shown) < 2 * 41_000


def test_several_groups_share_a_forward_where_few_images_are_shown() -> None:
    labels = np.random.default_rng(0).permutation(np.arange(160_000) % 8)
    groups, network = [first(labels, label) for label in range(8)], Pixels()
    rises = imprints(network, made(labels, labels != 2, groups), labels, groups, runtime=CPU)
    assert rises == [pytest.approx(6 / 7, abs=0.007), *[0] * 7]
    assert max(network.shown) <= BATCH and len(network.shown) <= 3 * len(labels) / BATCH  # named as they are; in two forwards


def test_up_to_so_many_images_are_all_shown_and_group_by_group() -> None:
    labels = np.arange(OTHERS) % 4
    groups, network = [first(labels, 0), first(labels, 3), ~first(labels, 3, 3000) & (labels == 3)], Pixels()
    obeys = np.random.default_rng(0).random(OTHERS) < 0.3
    rises = imprints(network, made(labels, obeys, groups[:1]), labels, groups, runtime=CPU)
    assert rises == [pytest.approx(obeys[labels != 0].mean()), 0, 0]
    assert network.shown == [BATCH, *[3 * BATCH // 4] * 3] * (OTHERS // BATCH)
