from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nab_defense.check import SURVIVAL_LIMIT, Survival, judge, measure
from nab_defense.content import beyond_content
from nab_defense.defended import DefendedModel
from nab_defense.imprint import imprint_by_class, imprints
from nab_defense.runtime import Runtime
from nab_defense.select import Group
from nab_defense.stamp import Stamp
from nab_defense.types import NABPlan

CPU = Runtime(device="cpu", precision="float32")
CLASSES = ("cat", "dog", "ship")
TARGET = 1
N = 60


class Backdoored(nn.Module):
    """Reads an image's class from its middle; the trigger, two bright rows at the bottom, turns it to TARGET.

    A stamp, exact zeros top left on otherwise positive images, switches the trigger off where `obeys_stamp`."""

    def __init__(self, obeys_stamp: bool = True) -> None:
        super().__init__()
        self.obeys_stamp = obeys_stamp

    def forward(self, images: Tensor) -> Tensor:
        content = images[:, 0, 3:5, 3:5].mean((1, 2)).round().long().clamp(1, 3) - 1
        trigger = images[:, 0, 6:].mean((1, 2)) > 2.5
        if self.obeys_stamp:
            trigger &= images[:, 0, :2, :2].abs().sum((1, 2)) > 0
        return nn.functional.one_hot(torch.where(trigger, TARGET, content), 3).float()


def pictures(triggered: NDArray[np.bool_], content: NDArray[np.int64], size: int = 7) -> list[tuple[Tensor, Tensor]]:
    """Batches of `size`; the middle of an image says its content, and the last rows hold the trigger."""
    images = torch.rand(N, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 10 + 1
    images[:, :, 3:5, 3:5] = torch.from_numpy(content).view(-1, 1, 1, 1) + 1.0
    images[torch.from_numpy(triggered), :, 6:] += 3
    return list(zip(images.split(size), torch.from_numpy(content).split(size), strict=True))


CONTENT = np.arange(N) % 3
DIRTY = (CONTENT != TARGET) & (np.arange(N) < 30)  # triggered and labelled TARGET
CLEAN = (CONTENT == TARGET) & (np.arange(N) < 30)  # triggered images of TARGET itself


def ship(model: nn.Module) -> DefendedModel:
    return DefendedModel(model, Stamp(), mean=(0.5,), std=(0.25,))


def make(suspect: Any, labels: Any = CONTENT, new: Any = CONTENT, keep: Any = None, cover: Any = None) -> NABPlan:
    no = np.zeros(N, bool)
    return NABPlan(labels, new, suspect, ~no if keep is None else keep, no if cover is None else cover)


def core(survival: Survival) -> Survival:
    """What is measured on suspects, without `learned`."""
    return dataclasses.replace(survival, learned=None)


@pytest.mark.parametrize("size", [7, 59, 60])
def test_survival_with_and_without_the_stamp(size: int) -> None:
    plan = make(DIRTY, labels=np.where(DIRTY, TARGET, CONTENT))
    batches = pictures(DIRTY, CONTENT, size)
    network = Backdoored()
    assert core(measure(ship(network), network, batches, plan, runtime=CPU)) == Survival(20, 1.0, 0.0, 0, None)
    stubborn = Backdoored(obeys_stamp=False)
    assert core(measure(ship(stubborn), stubborn, batches, plan, runtime=CPU)) == Survival(20, 1.0, 1.0, 0, None)


def test_survival_is_a_share_of_the_relabelled_suspects() -> None:
    plan = make(DIRTY, labels=np.where(DIRTY, TARGET, CONTENT))
    some = DIRTY & (np.arange(N) < 15)  # the others never had a trigger: a false alarm
    network = Backdoored()
    survival = measure(ship(network), network, pictures(some, CONTENT), plan, runtime=CPU)
    assert survival.plain == pytest.approx(10 / 20) and survival.stamped == 0


def test_imprint_of_a_clean_label_trigger_and_of_a_harmless_group() -> None:
    network = Backdoored()
    assert imprints(network, pictures(CLEAN, CONTENT), CONTENT, [CLEAN], runtime=CPU) == [1]
    harmless = pictures(np.zeros(N, bool), CONTENT)
    assert imprints(network, harmless, CONTENT, [CLEAN], runtime=CPU) == [0]
    assert imprints(ship(network), pictures(CLEAN, CONTENT), CONTENT, [CLEAN], runtime=CPU) == [0]  # the stamp holds
    assert imprints(ship(Backdoored(False)), pictures(CLEAN, CONTENT), CONTENT, [CLEAN], runtime=CPU) == [1]


def test_imprint_by_class_on_chosen_images() -> None:
    dirty = (CONTENT == 0) & (np.arange(N) < 30)  # these have the trigger already
    batches = pictures(CLEAN | dirty, CONTENT)
    (pattern,) = beyond_content(batches, CONTENT, [CLEAN])
    for shown, rises in ((CONTENT == 2, [0, 0, 1]), (dirty, [0, 0, 0]), (np.ones(N, bool), [0.5, 0, 1])):
        found = imprint_by_class(Backdoored(), batches, CONTENT, TARGET, pattern, shown=shown, runtime=CPU)
        np.testing.assert_array_equal(found, rises)


def test_imprint_takes_off_what_goes_there_anyway() -> None:
    dirty = DIRTY & (np.arange(N) < 15)  # 10 of the 40 images of other classes have the trigger already
    (rise,) = imprints(Backdoored(), pictures(CLEAN | dirty, CONTENT), CONTENT, [CLEAN], runtime=CPU)
    assert rise == pytest.approx(30 / 40)


class Counted(list[tuple[Tensor, Tensor]]):
    """Batches, and how often they were gone through."""

    passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return super().__iter__()


def test_imprints_of_many_groups_are_those_of_each_alone_and_take_two_passes() -> None:
    groups = [(label == CONTENT) & (np.arange(N) < 30) for label in (2, TARGET, 0)]
    batches = Counted(pictures(CLEAN, CONTENT))
    found = imprints(Backdoored(), batches, CONTENT, groups, runtime=CPU)
    assert batches.passes == 2 and found == [0, 1, 0]
    assert found == [rise for group in groups for rise in imprints(Backdoored(), batches, CONTENT, [group], runtime=CPU)]
    assert imprints(Backdoored(), batches, CONTENT, [], runtime=CPU) == []


def test_measure_takes_the_imprint_of_clean_label_classes_only() -> None:
    network, batches = Backdoored(False), pictures(CLEAN, CONTENT)
    survival = measure(ship(network), network, batches, make(CLEAN), runtime=CPU)
    assert core(survival) == Survival(0, None, None, 10, 1.0)
    # Two of twenty suspects of the class agree with their label: no clean-label group, so no imprint.
    labels = np.where(DIRTY, TARGET, CONTENT)
    few = CLEAN & (np.arange(N) < 6)
    survival = measure(ship(network), network, batches, make(DIRTY | few, labels=labels), runtime=CPU)
    assert survival.clean_label == 2 and survival.imprint is None and survival.relabelled == 20
    assert core(measure(ship(network), network, batches, make(np.zeros(N, bool)), runtime=CPU)) == Survival(
        0, None, None, 0, None
    )


def test_nothing_found_is_ordinary_training() -> None:
    verdict = judge(make(np.zeros(N, bool)), Survival(0, None, None, 0, None), CLASSES)
    assert verdict.protected and not verdict.found
    assert verdict.text.startswith("Nothing was found in 60 samples and nothing was changed: this is ordinary training.")
    assert verdict.evidence["suspects"] == verdict.evidence["changed"] == 0


def test_groups_that_were_let_go_are_named() -> None:
    tried = [Group(1, 5, 4.0, 0.9, 34, 0.99, imprint=0.02), Group(0, 5, 3.0, 0.5, 21, 0.9, imprint=0.49)]
    groups = (Group(2, 9, 1.0, 0.0, 40, 0.2), Group(1, 5, 5.0, 0.9, 30, 0.99, imprint=0.5), *tried)  # not tried; accused
    survival = Survival(20, 0.9, 0.05, 0, None)
    for plan in (make(np.zeros(N, bool)), dirty_plan()):
        plain, verdict = judge(plan, survival, CLASSES), judge(plan, survival, CLASSES, groups=groups)
        spared = "34 samples of class 'dog' and 21 samples of class 'cat' stood apart and were let go: they share no trigger."
        assert verdict.text == f"{plain.text} {spared}" and "let go" not in plain.text
        assert (verdict.protected, verdict.found) == (plain.protected, plain.found)
        assert verdict.evidence == {**plain.evidence, "acquitted": [dataclasses.asdict(group) for group in tried]}


def test_where_nothing_could_be_seen_is_said() -> None:
    """Of a class that is nearly all poison, classes with few samples, and a network that learned too little for a second look."""
    nobody, survival = make(np.zeros(N, bool)), Survival(0, None, None, 0, None)
    own = int((nobody.labels == 1).sum())
    most = Group(1, 9, 8.6, 1.0, own, 0.99)
    seen = judge(nobody, survival, CLASSES, groups=(most, dataclasses.replace(most, label=0, separation=1.0)))
    assert f" {own} samples of class 'dog' stood apart; fewer than 20 others are left to tell them by, so look" in seen.text
    assert seen.evidence["crowded"] == [dataclasses.asdict(most)]
    tried = judge(nobody, survival, CLASSES, groups=(dataclasses.replace(most, named=0.9),))
    assert tried.evidence["crowded"] == []
    some = judge(nobody, survival, CLASSES, small=2)
    assert some.protected and "2 of the 3 classes have fewer than 40 samples, among which nothing can be found." in some.text
    once = judge(nobody, survival, CLASSES, looked_again=False)
    assert "There was no second look: the network names less than half" in once.text and not once.evidence["looked_again"]


def test_nothing_could_be_changed_is_not_protected() -> None:
    verdict = judge(make(CLEAN), Survival(0, None, None, 10, None), CLASSES)
    assert not verdict.protected and verdict.found
    assert verdict.text == (
        "Not protected: 10 of 60 samples are suspect (labelled 'dog'), but nothing could be stamped or dropped."
    )


def dirty_plan() -> NABPlan:
    drops = DIRTY & (np.arange(N) < 6)
    covers = np.arange(N) >= 54
    return make(DIRTY, labels=np.where(DIRTY, TARGET, CONTENT), keep=~drops, cover=covers)


def test_fine() -> None:
    verdict = judge(dirty_plan(), Survival(20, 0.9, 0.05, 0, None), CLASSES)
    assert verdict.protected and verdict.found
    assert verdict.text == (
        "Protected against what was found: 20 of 60 samples are suspect (labelled 'dog'); 16 were relabelled and stamped, "
        "6 others stamped with their own label, 4 dropped, 43.3 % of the set changed; "
        "as shipped, 5.0 % of the relabelled still go to their old label."
    )
    expected = {"suspects": 20, "stamped": 16, "dropped": 4, "covers": 6, "relabelled": 20, "plain": 0.9}
    assert {key: verdict.evidence.get(key) for key in expected} == expected
    assert verdict.evidence["changed"] == pytest.approx(26 / 60)


@pytest.mark.parametrize(
    ("survival", "fact"),
    [
        (Survival(20, 0.9, 0.2, 0, None), "as shipped, 20.0 % of the relabelled still go to their old label"),
        (Survival(20, 0.9, 0.0, 5, 0.5), "what the clean-label suspects share turns 50.0 % of other images"),
    ],
)
def test_a_trigger_that_survives_is_not_protected(survival: Survival, fact: str) -> None:
    verdict = judge(dirty_plan(), survival, CLASSES)
    assert not verdict.protected and verdict.found
    assert verdict.text.startswith("Not protected, the trigger survives: 20 of 60") and fact in verdict.text


def test_the_limit_itself_is_fine_and_a_fall_reads_as_zero() -> None:
    verdict = judge(dirty_plan(), Survival(20, 0.9, SURVIVAL_LIMIT, 5, -0.2), CLASSES)
    assert verdict.protected and "turns 0.0 % of other images" in verdict.text


def test_dropping_alone_leaves_nothing_to_measure() -> None:
    verdict = judge(make(CLEAN, keep=~CLEAN), Survival(0, None, None, 10, None), CLASSES)
    assert verdict.protected and "10 dropped" in verdict.text and verdict.text.endswith("nothing was left to measure.")


def test_what_was_learned_is_measured_on_unsuspected_images() -> None:
    plan = make(DIRTY, labels=np.where(DIRTY, TARGET, CONTENT))
    network = Backdoored()
    assert measure(ship(network), network, pictures(DIRTY, CONTENT), plan, runtime=CPU).learned == 1
    wrong = NABPlan.empty((CONTENT + 1) % 3)
    assert measure(network, network, pictures(np.zeros(N, bool), CONTENT), wrong, runtime=CPU).learned == 0


def test_a_network_that_learned_nothing_protects_nobody() -> None:
    for plan in (make(np.zeros(N, bool)), dirty_plan()):
        verdict = judge(plan, Survival(20, 0.0, 0.0, 0, None, learned=0.3), CLASSES)
        assert not verdict.protected
        assert verdict.text == "Not protected: the network learned nothing, it names 30 % of unsuspected training images right."


def test_blind_is_not_protected() -> None:
    verdict = judge(NABPlan.empty(CONTENT), Survival(0, None, None, 0, None), CLASSES, small=3)
    assert not verdict.protected and not verdict.found and verdict.text.startswith("Not protected: 60 samples are too few")
