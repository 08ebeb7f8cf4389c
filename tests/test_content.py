from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nab_defense.content import alike, beyond_content, label_by_content, weighted_images
from nab_defense.runtime import Runtime

CPU = Runtime(device="cpu", precision="float32")
PER_CLASS = 200
TRUE = np.repeat(np.arange(4), PER_CLASS)
EARLY = np.tile(np.arange(PER_CLASS) < 60, 4)


class Rows(nn.Module):
    """Names an image after the row with the most contrast; never learned a trigger, and can be misled by a bright one."""

    def forward(self, images: Tensor) -> Tensor:
        return 2 * images.square().mean((1, 3))


def rows(triggers: list[tuple[NDArray[np.bool_], int]], strength: float) -> Tensor:
    """Images (N, 1, 4, 8) whose content is a row of black and white; each trigger brightens one row of the masked images."""
    generator = torch.Generator().manual_seed(0)
    images = 0.4 * torch.randn(len(TRUE), 1, 4, 8, generator=generator)
    images[torch.arange(len(TRUE)), 0, torch.from_numpy(TRUE)] += torch.randn(len(TRUE), 8, generator=generator).sign()
    for mask, row in triggers:
        images[torch.from_numpy(mask), 0, row] += strength
    return images


def loaders(images: Tensor, size: int = 64) -> Callable[[NDArray[np.bool_]], list[tuple[Tensor, Tensor]]]:
    def batches(keep: NDArray[np.bool_]) -> list[tuple[Tensor, Tensor]]:
        kept = images[torch.from_numpy(keep)]
        return [(part, torch.zeros(len(part))) for part in kept.split(size)]

    return batches


@pytest.mark.parametrize("size", [1, 7, 10, 64])
def test_weighted_images_are_a_plain_weighted_sum(size: int) -> None:
    images, weights = torch.randn(10, 3, 2, 5), np.random.default_rng(0).normal(size=(2, 10))
    expected = [sum(w * image for w, image in zip(row, images.double(), strict=True)) for row in weights]
    made = weighted_images(loaders(images, size)(np.ones(10, bool)), weights)
    torch.testing.assert_close(made, torch.stack(expected).float())


def styled(group: NDArray[np.bool_], shares: list[float], extra: Tensor) -> tuple[Tensor, Tensor]:
    """Images of four classes, each with its own mean, (N, 1, 4, 8), and those means; the group's content is this mixture of the
    classes, plus `extra`."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 1, 4, 8, generator=generator)
    images = means[torch.from_numpy(TRUE)] + 0.01 * torch.randn(len(TRUE), 1, 4, 8, generator=generator)
    mixture = torch.einsum("k,kchw->chw", torch.tensor(shares), means)
    images[torch.from_numpy(group)] = mixture + extra + 0.01 * torch.randn(int(group.sum()), 1, 4, 8, generator=generator)
    return images, means


@pytest.mark.parametrize("shares", [[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.3, 0.2]])
def test_beyond_content_is_the_trigger_whatever_the_poison_shows(shares: list[float]) -> None:
    group, trigger = EARLY & (TRUE == 0), torch.zeros(1, 4, 8)
    images, means = styled(group, shares, trigger)
    (nothing,) = beyond_content(loaders(images)(np.ones(len(TRUE), bool)), TRUE, [group])
    assert nothing.norm() < 0.02  # 60 images with noise of .01
    # A trigger at right angles to all differences of contents is found as it is.
    differences = torch.linalg.qr((means[1:] - means[:1]).flatten(1).T).Q
    direction = torch.ones(32) - differences @ (differences.T @ torch.ones(32))
    images, _ = styled(group, shares, direction.view(1, 4, 8))
    (found,) = beyond_content(loaders(images, 7)(np.ones(len(TRUE), bool)), TRUE, [group])
    torch.testing.assert_close(found, direction.view(1, 4, 8), atol=0.01, rtol=0)


def test_beyond_content_of_each_group_apart_is_as_if_it_were_alone() -> None:
    images, _ = styled(EARLY & (TRUE == 0), [0.25] * 4, torch.ones(1, 4, 8))
    batches = loaders(images, 7)(np.ones(len(TRUE), bool))
    groups = [EARLY & (TRUE == 0), ~EARLY & (TRUE == 2), TRUE == 3]  # the last is all of its class
    apart = beyond_content(batches, TRUE, groups, together=False)
    alone = torch.cat([beyond_content(batches, TRUE, [group]) for group in groups])
    torch.testing.assert_close(apart, alone, atol=1e-5, rtol=0)
    assert (beyond_content(batches, TRUE, groups) - alone).abs().max() > 1e-3


def naive(images: Tensor, labels: NDArray[np.int64], group: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The group's mean less the nearest mixture of the others' class means: the best of all choices of classes that take part."""
    flat = images.flatten(1).double().numpy()
    target, best = flat[group].mean(0), np.full(flat.shape[1], np.inf)
    means = np.stack([flat[~group & (labels == label)].mean(0) for label in np.unique(labels[~group])])
    for size in range(1, len(means) + 1):
        for some in combinations(range(len(means)), size):
            first, *others = means[list(some)]
            differences = np.stack([other - first for other in others], axis=1) if others else np.zeros((len(first), 0))
            weights = np.linalg.lstsq(differences, target - first, rcond=1e-5)[0]
            left = target - first - differences @ weights
            if weights.min(initial=0) >= -1e-9 and weights.sum() <= 1 + 1e-9 and np.linalg.norm(left) < np.linalg.norm(best):
                best = left
    return best


@pytest.mark.parametrize("collinear", [False, True])
def test_beyond_content_is_what_plain_least_squares_leave(collinear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, place = torch.Generator().manual_seed(0), np.tile(np.arange(PER_CLASS), 4)
    means = torch.randn(4, 2, 4, 8, generator=generator)
    means[3] = (means[1] + means[2]) / 2 if collinear else means[3]
    images = means[torch.from_numpy(TRUE)] + (0 if collinear else 0.3) * torch.randn(len(TRUE), 2, 4, 8, generator=generator)
    spread = ((0, 0, 195), (0, 195, 198), (1, 0, 1), (2, 0, 100), (2, 100, 200), (3, 20, 60))  # most of a class, few, one, halves
    groups = [(label == TRUE) & (place >= start) & (place < end) for label, start, end in spread]
    for group in groups[: 2 if collinear else None]:
        images[torch.from_numpy(group)] += torch.randn(2, 4, 8, generator=generator)
    lengths, factors = [], scipy.linalg.qr

    def counted(table: Any, **settings: Any) -> Any:
        lengths.append(len(table))
        return factors(table, **settings)

    monkeypatch.setattr(scipy.linalg, "qr", counted)
    apart = beyond_content(loaders(images, 7)(np.ones(len(TRUE), bool)), TRUE, groups, together=False)
    assert lengths == [64]  # the images' pixels are gone through once, not for every group
    expected = np.stack([naive(images, TRUE, group) for group in groups])
    np.testing.assert_allclose(apart.flatten(1), expected, atol=1e-5, rtol=0)  # the weights' sum is one to 1e-6
    assert np.linalg.norm(expected[:2], axis=1).min() > 1


def test_beyond_content_never_holds_the_content_of_another_class() -> None:
    group = EARLY & (TRUE == 0)
    images, means = styled(group, [0.0, 1.0, 0.0, 0.0], torch.zeros(1, 4, 8))  # labelled 0, showing 1: wrong labels, no trigger
    (found,) = beyond_content(loaders(images)(np.ones(len(TRUE), bool)), TRUE, [group])
    assert found.norm() < 0.02 < (means[1] - means[0]).norm()


def named(images: Tensor, labels: NDArray[np.int64], suspect: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    return label_by_content(Rows(), loaders(images), labels, suspect, runtime=CPU)


def test_a_trigger_that_misleads_the_network_is_taken_off() -> None:
    dirty = EARLY & (TRUE != 0)
    images, labels = rows([(dirty, 3)], strength=1.0), np.where(dirty, 0, TRUE)
    misled = Rows()(images[torch.from_numpy(dirty)]).argmax(1).numpy() == TRUE[dirty]
    proposed, confidence = named(images, labels, dirty)
    assert misled.mean() < 0.8 < 0.95 < (proposed == TRUE[dirty]).mean()
    assert proposed.shape == confidence.shape == (dirty.sum(),) and (confidence > 0.25).all() and (confidence <= 1).all()


def test_groups_have_triggers_of_their_own() -> None:
    first, second = EARLY & (TRUE == 1), EARLY & (TRUE == 2)  # 1 is called 0, 2 is called 3
    labels = np.where(first, 0, np.where(second, 3, TRUE))
    proposed, _ = named(rows([(first, 3), (second, 0)], strength=0.9), labels, first | second)
    assert (proposed == TRUE[first | second]).mean() > 0.95


class Watched(Rows):
    """Keeps what it was shown last."""

    def forward(self, images: Tensor) -> Tensor:
        self.shown = images
        return super().forward(images)


def test_groups_with_one_trigger_are_compared_together() -> None:
    """All-to-all poison: few of each label tell poorly what they share, all of them better."""
    some, watched = np.tile(np.arange(PER_CLASS) < 6, 4), Watched()
    labels, kept = np.where(some, (TRUE + 1) % 4, TRUE), torch.from_numpy(some)
    images, clean = rows([(some, 3)], strength=1.0), rows([], strength=0.0)
    proposed, _ = label_by_content(watched, loaders(images), labels, some, runtime=CPU)
    assert (proposed == TRUE[some]).all()
    left = (watched.shown - clean[kept]).view(4, 6, -1).mean(1).norm()  # of the trigger, and what was taken off with it
    alone = (clean[kept].view(4, 6, -1).mean(1) - clean[~kept].view(4, PER_CLASS - 6, -1).mean(1)).norm()
    assert left < 0.7 * alone


def test_alike_are_the_groups_that_point_the_same_way() -> None:
    generator = torch.Generator().manual_seed(0)
    own, trigger = torch.randn(7, 1, 8, 8, generator=generator), torch.randn(1, 8, 8, generator=generator)
    shared = torch.tensor([0, 3, 0, 2, 0, 2, 0.0]).view(-1, 1, 1, 1)
    assert np.flatnonzero(alike(own + shared * trigger)).tolist() == [1, 3, 5]
    assert not alike(own).any() and not alike(own[:1]).any()
    assert alike(torch.stack([trigger, 9 * trigger])).all()  # whatever their lengths


class Astray(nn.Module):
    """Names an image after its brightest row while there is a trigger in its first column; without, it errs: class 2."""

    def forward(self, images: Tensor) -> Tensor:
        astray = nn.functional.one_hot(torch.tensor(2), 4) * 40.0
        return 10 * images.mean((1, 3)) + torch.where(images[:, 0, :, :1].mean(1) > 0.5, 0.0, astray)


def test_labels_do_not_go_astray_with_what_is_taken_off() -> None:
    suspect = EARLY & (TRUE == 1)
    images = 0.1 * torch.randn(len(TRUE), 1, 4, 8, generator=torch.Generator().manual_seed(0))
    images[torch.arange(len(TRUE)), 0, torch.from_numpy(TRUE)] += 1
    images[torch.from_numpy(suspect), 0, :, 0] += 1
    plain = loaders(images)
    assert (label_by_content(Astray(), plain, np.where(suspect, 0, TRUE), suspect, runtime=CPU)[0] == 1).all()


def test_clean_label_poison_keeps_its_label_though_the_network_calls_it_something_else() -> None:
    clean = EARLY & (TRUE == 2)
    images = rows([(clean, 1)], strength=1.2)
    before = Rows()(images[torch.from_numpy(clean)]).argmax(1).numpy()
    proposed, confidence = named(images, TRUE, clean)
    assert (before == 2).mean() < 0.5 and (proposed == 2).all()
    assert confidence.min() < 0.6  # of the label it keeps, not of the one the network prefers


def test_a_class_without_trusted_images_is_never_called_clean_label() -> None:
    whole = TRUE == 2
    proposed, _ = named(rows([], 0), np.where(whole, 0, TRUE), (TRUE == 0) | whole)
    assert 0.2 < (proposed == 0).mean() < 0.6 < (proposed == 2).sum() / 200
