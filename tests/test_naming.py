from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from nab_defense.content import beyond_content
from nab_defense.naming import CONTROL, all_bearers, bearers, carried, control, naming, second_choices
from nab_defense.select import MIN_VALLEY, Group

LABELS = np.repeat([0, 1, 2, 3], [40, 20, 20, 20])
GROUP = np.arange(100) < 20
OTHERS = np.arange(100) % 4 == 3


def logits(names: list[int], margin: float) -> np.ndarray:
    """What every sample is named, the group (its first 20) with this margin, the others with 4."""
    table = np.zeros((100, 4), np.float32)
    table[np.arange(100), np.r_[names, LABELS[20:]]] = np.r_[np.full(20, margin), np.full(80, 4)]
    return table


def test_content_of_all_other_classes_is_foreign() -> None:
    seen = naming(logits([1, 2, 3, 1, 2] * 4, 4), LABELS, GROUP, OTHERS & ~GROUP)
    assert seen.named == 0 and seen.sure == pytest.approx(0.5, abs=0.05) and seen.spread == pytest.approx(0.96, abs=0.01)
    assert Group(0, 0, 4.0, 0.9, 20, 0.0, named=seen.named, sure=seen.sure, spread=seen.spread).foreign


@pytest.mark.parametrize(
    ("names", "margin", "why"), [([1, 2, 3, 1, 2] * 4, 1, "sure"), ([1] * 14 + [2] * 6, 4, "spread"), ([0] * 20, 4, "sure")]
)
def test_a_style_of_its_class_is_not(names: list[int], margin: float, why: str) -> None:
    seen = naming(logits(names, margin), LABELS, GROUP, OTHERS & ~GROUP)
    group = Group(0, 0, 4.0, 0.9, 20, 0.0, named=seen.named, sure=seen.sure, spread=seen.spread)
    assert not group.foreign and (seen.sure < 0.1 if why == "sure" else seen.sure > 0.4 and seen.spread < 0.7)
    turning = dataclasses.replace(group, source=0.25, carried=0.3)
    assert turning.unlike is (seen.named == 0) and turning.foreign is turning.unlike
    assert not dataclasses.replace(turning, source=0.03).foreign
    assert not dataclasses.replace(turning, carried=0.09).foreign
    assert dataclasses.replace(turning, source=0.5, carried=0.06).foreign is turning.unlike
    assert not dataclasses.replace(turning, source=0.9, carried=0.05).foreign
    assert dataclasses.replace(group, every=0.5).foreign is turning.unlike and not dataclasses.replace(group, every=0.4).foreign


@pytest.mark.parametrize("classes", [9, 10])
def test_content_that_comes_second_is_foreign_where_there_are_many_classes(classes: int) -> None:
    """More of the poison was not left out and taught its trigger, so that half of the group gets its given label."""
    labels = np.repeat(np.arange(classes), 40)
    group = np.arange(len(labels)) < 20
    table = 4 * np.eye(classes, dtype=np.float32)[np.where(group, 1 + np.arange(len(labels)) % (classes - 1), labels)]
    table[:10, 0] = 6
    seen = naming(table, labels, group, ~group)
    assert seen.named == 0.5 and (seen.sure > 0.3 and seen.spread > 0.9) is (classes == 10)
    found = Group(0, 0, 4.0, 0.9, 20, 0.0, named=seen.named, sure=seen.sure, spread=seen.spread)
    assert found.foreign is (classes == 10) and not dataclasses.replace(found, named=0.6).foreign
    assert not dataclasses.replace(found, alike=0.4).foreign  # what is alike is judged as one


def test_nothing_to_compare_with_tells_nothing() -> None:
    seen = naming(logits([1, 2, 3, 1, 2] * 4, 4), LABELS, GROUP, (LABELS == 0) & ~GROUP)
    assert (seen.named, seen.sure, seen.spread) == (0.0, 0.0, 0.0)


def test_what_comes_second_speaks_for_poison_where_it_is_sure_and_of_many_classes() -> None:
    table = logits([0] * 20, 9)
    table[20:, :] += 0.5 * np.eye(4, dtype=np.float32)[(LABELS[20:] + 1) % 4]
    for names, margin, likely in (([1, 2, 3], 5, (1, 1)), ([1, 2, 3], 0, (0, 0)), ([1], 5, (1, 0))):
        table[:20, 1:] = 0
        table[np.arange(20), np.resize(names, 20)] = margin
        (found,) = second_choices(table, LABELS, [GROUP], np.zeros(100, bool))
        assert found == pytest.approx(likely, abs=0.01)
    assert second_choices(table[:, :2], LABELS % 2, [GROUP], np.zeros(100, bool))[0][1] == 0


def test_the_others_are_drawn_from_what_is_not_absent() -> None:
    absent = np.arange(20000) % 2 == 0
    others = control(absent, 3)
    assert not (others & absent).any() and others.sum() == CONTROL * 10000
    np.testing.assert_array_equal(others, control(absent, 3))
    assert (others != control(absent, 4)).any()
    assert control(np.arange(5) < 3, 0).sum() == 1


def with_style(covers: int, own: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Images of four classes of 200; thirty of class 0 show class 1 and a patch, `covers` of classes 2 and 3 carry it, too."""
    generator = torch.Generator().manual_seed(0)
    labels = np.repeat(np.arange(4), 200)
    images = torch.randn(4, 1, 6, 6, generator=generator)[labels] + 0.5 * torch.randn(800, 1, 6, 6, generator=generator)
    images[:30] += images[200:400].mean(0) - images[30:200].mean(0)
    images[:30, 0, 4:, 4:] += 2.0
    images[400 : 400 + covers, 0, 4:, 4:] += 2.0
    return images, labels, np.arange(800) < 30 + own


@pytest.mark.parametrize("own", [0, 10])
def test_covers_carry_what_a_trigger_for_one_class_shares(own: int) -> None:
    for covers, seen in ((40, True), (4, False), (0, False)):  # a few may be anything
        images, labels, group = with_style(covers, own)  # with some of the class itself, which came with it
        batches = [(part, torch.zeros(len(part))) for part in images.split(64)]
        assert (carried(batches, labels, [group], beyond_content(batches, labels, [group]))[0] > MIN_VALLEY) is seen


@pytest.mark.parametrize("patch", [True, False])
def test_who_shows_the_trigger_of_a_group_is_told_from_the_rest_of_its_class(patch: bool) -> None:
    """Forty of class 0 show the others' content and a patch, and six of them were not found; or they are as the rest."""
    generator = torch.Generator().manual_seed(1)
    labels, first = np.repeat(np.arange(4), 200), np.arange(800) < 40
    contents = np.where(first & patch, 1 + np.arange(800) % 3, labels)
    images = torch.randn(4, 1, 6, 6, generator=generator)[contents] + 0.3 * torch.randn(800, 1, 6, 6, generator=generator)
    images[:40, 0, 4:, 4:] += 3.0 * patch
    batches = [(part, torch.zeros(len(part))) for part in images.split(64)]
    (likely,) = bearers(batches, labels, [np.arange(800) < 34])
    np.testing.assert_array_equal(likely > 0.5, first & patch)
    assert bearers(batches, labels, []) == []


@pytest.mark.parametrize("patch", [True, False])
def test_who_shows_the_trigger_of_parts_of_several_classes_is_told_in_every_class(patch: bool) -> None:
    """Ten of each class show the one before it and a patch; in two classes eight of them are known, in another nobody is."""
    generator = torch.Generator().manual_seed(1)
    labels, poisoned = np.repeat(np.arange(4), 100), np.arange(400) % 100 < 10
    contents = np.where(poisoned, (labels - 1) % 4, labels)
    images = torch.randn(4, 1, 6, 6, generator=generator)[contents] + 0.3 * torch.randn(400, 1, 6, 6, generator=generator)
    images[torch.from_numpy(poisoned), 0, 4:, 4:] += 3.0 * patch
    batches = [(part, torch.zeros(len(part))) for part in images.split(64)]
    groups = [(labels == label) & (np.arange(400) % 100 < 8) for label in (0, 2)]
    likely = all_bearers(batches, labels, np.any(groups, axis=0), beyond_content(batches, labels, groups))
    if patch:
        np.testing.assert_array_equal(likely > 0.5, poisoned)
    else:
        assert not (likely > 0.5)[~poisoned].any()
