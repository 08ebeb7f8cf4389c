"""What networks make of classes that they never saw: poison among them, styles, and who is left out."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from nab_defense import again, examine, outside
from nab_defense.again import _named, _sifted
from nab_defense.candidates import unasked
from nab_defense.outside import COMPARED, FOLDS, foreign_parts
from nab_defense.scan import Scan
from nab_defense.select import MIN_CONTENT, Group, Selection
from tests.networks import ANY

CLASSES, EACH = 12, 100
LABELS = np.repeat(np.arange(CLASSES), EACH)
CONTENT = LABELS.copy()  # what the images show
POISON = np.zeros(len(LABELS), bool)
POISON[:30] = True
CONTENT[:30] = np.resize(np.arange(1, CLASSES), 30)
NOBODY = Selection(np.zeros(len(LABELS), bool), np.zeros(len(LABELS), np.float32))
SESSION: Any = SimpleNamespace(recipe=SimpleNamespace(seed=0))


def seen() -> Scan:
    """A network that was trained on all of it sees the trigger in one direction."""
    features = np.random.default_rng(0).standard_normal((len(LABELS), 4)).astype(np.float32)
    features[POISON, 0] += 8
    logits = 6 * np.eye(CLASSES, dtype=np.float32)[LABELS]
    return Scan(LABELS, np.zeros(len(LABELS), np.float32), logits, features)


class Outside:
    """Stands for networks trained without whole classes: sure of what they know, at a loss with the rest, which looks like 11."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, content: np.ndarray = CONTENT) -> None:
        self.absent: dict[str, np.ndarray] = {}
        self.content = content
        monkeypatch.setattr(outside, "seen_by", self.see)

    def __call__(self, absent: np.ndarray, name: str) -> Any:
        self.absent[name] = absent
        return name

    def see(self, _: object, name: Any) -> Scan:
        gone = [label for label in range(CLASSES) if self.absent[name][label == LABELS].all()]
        noise = np.random.default_rng(1).normal(0, 0.5, (len(LABELS), CLASSES))
        logits = noise + 8 * np.eye(CLASSES)[self.content]
        unknown = np.isin(self.content, gone)
        logits[unknown] = noise[unknown] + np.eye(CLASSES)[11]
        logits[:, gone] = -9
        return Scan(LABELS, np.zeros(len(LABELS), np.float32), logits.astype(np.float32), np.zeros((len(LABELS), 1), np.float32))


def test_the_part_of_a_class_that_shows_what_others_show_is_foreign_to_a_network_that_never_saw_the_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    networks = Outside(monkeypatch)
    found = foreign_parts(SESSION, seen(), np.zeros(len(LABELS), bool), {}, networks)
    assert sorted(found) == [*range(CLASSES)] and sorted(networks.absent) == ["class0", "fold1", "fold2", "fold3"]
    group, likely = found[0]
    assert group.foreign and group.content is not None and group.content > 0.3 and group.size == 30
    np.testing.assert_array_equal(likely > 0.5, POISON)
    assert not any(group.foreign for label, (group, _) in found.items() if label)
    whole = np.array([[networks.absent[f"fold{k + 1}"][label == LABELS].all() for k in range(FOLDS)] for label in range(CLASSES)])
    assert (whole.sum(1) == 1).all() and (whole.sum(0) == CLASSES / FOLDS).all()  # each class is left out once
    assert networks.absent["class0"][:EACH].all() and 0 < networks.absent["class0"][EACH:].mean() < 0.15  # and the control


def test_a_part_that_stands_apart_by_itself_is_taken_where_it_is_more_foreign_than_what_grows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blind = dataclasses.replace(seen(), features=np.random.default_rng(2).standard_normal((len(LABELS), 64)).astype(np.float32))
    networks, nobody = Outside(monkeypatch), np.zeros(len(LABELS), bool)
    alone, beside = (foreign_parts(SESSION, blind, nobody, queues, networks) for queues in ({}, {0: queue(0, 0, 30)}))
    assert (alone[0][1] > 0.5)[~POISON].any()  # the trained network does not tell them apart
    np.testing.assert_array_equal(beside[0][1] > 0.5, POISON)
    assert (beside[0][0].content or 0) > MIN_CONTENT > (alone[0][0].content or 0) and beside[0][0].size == 30


@pytest.mark.parametrize(("grows", "taken"), [(60, 36), (40, 40)])
def test_a_part_that_stands_apart_goes_before_what_grows_to_most_of_its_class(
    monkeypatch: pytest.MonkeyPatch, grows: int, taken: int
) -> None:
    """Seventy of class 0 show other classes' content, thirty of those that stand apart, and all that grow."""
    content = np.where(np.arange(len(LABELS)) < 70, np.resize(np.arange(1, CLASSES), len(LABELS)), LABELS)
    likely = (np.arange(EACH) < grows).astype(np.float64)
    monkeypatch.setattr(outside, "grow", lambda features, members, *_: (Group(0, 0, 0.0, 0.0, 0, 0.0), likely[: members.sum()]))
    found = foreign_parts(SESSION, seen(), np.zeros(len(LABELS), bool), {0: queue(0, 40, 36)}, Outside(monkeypatch, content))
    assert found[0][0].foreign and found[0][0].size == taken


def test_half_of_a_class_that_is_named_as_surely_but_after_few_classes_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty of class 0 show all other classes' content, twenty of those in the part; the larger one looks like five classes."""
    content = LABELS.copy()
    content[:30], content[55:EACH] = np.resize(np.arange(1, CLASSES), 30), np.resize(np.arange(1, 6), 45)
    likely = (np.arange(EACH) < 80).astype(np.float64)
    monkeypatch.setattr(outside, "grow", lambda features, members, *_: (Group(0, 0, 0.0, 0.0, 0, 0.0), likely[: members.sum()]))
    apart = queue(0, 10, 30) + queue(0, 55, 45)
    found = foreign_parts(SESSION, seen(), np.zeros(len(LABELS), bool), {0: apart}, Outside(monkeypatch, content))
    assert found[0][0].size == 30


def test_a_style_of_a_class_is_not_foreign_and_no_class_is_asked_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = Outside(monkeypatch, np.where(POISON, 3, LABELS))  # zeros that look like threes, all of them
    found = foreign_parts(SESSION, seen(), np.zeros(len(LABELS), bool), {}, networks)
    assert sorted(networks.absent) == ["fold1", "fold2", "fold3"] and (found[0][0].content or 0) < MIN_CONTENT


def test_who_is_accused_already_and_classes_of_a_few_are_left_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    networks, aside = Outside(monkeypatch), (LABELS == 5) & (np.arange(len(LABELS)) % EACH < 61)
    found = foreign_parts(SESSION, seen(), aside, {}, networks)
    assert 5 not in found and len(found) == CLASSES - 1  # 39 of it are left
    assert all(absent[aside].all() for absent in networks.absent.values())
    assert not any(likely[aside].any() for _, likely in found.values())
    assert foreign_parts(SESSION, seen(), np.ones(len(LABELS), bool), {}, networks) == {}


def queue(label: int, first: int, size: int, **given: Any) -> list[Any]:
    likely = np.zeros(len(LABELS))
    likely[EACH * label + first : EACH * label + first + size] = 1
    return [(Group(label, 0, 4.0, 0.9, size, 0.9, **given), likely)]


def test_what_is_foreign_is_kept_and_of_the_rest_what_may_share_a_trigger(monkeypatch: pytest.MonkeyPatch) -> None:
    networks, asked = Outside(monkeypatch), []

    def shows(session: Any, trained: Any, scan: Scan, suspect: np.ndarray, group: Group, part: np.ndarray) -> bool:
        asked.append(group.label)
        return group.label == 2

    monkeypatch.setattr(again, "shows_trigger", shows)
    queues = {label: queue(label, 0, 40) for label in (1, 2, 3)}
    worth, selection, doubted = _sifted(SESSION, ANY, seen(), NOBODY, queues, {3}, networks)
    assert sorted(worth) == [0, 2] and worth[0][0][0].foreign and asked == [1, 2]  # the rest of class 3 is not a trigger's
    assert not doubted
    assert worth[2][0][0].content is not None and not worth[2][0][0].foreign
    assert sorted(group.label for group in selection.groups) == [1, 3] and all(group.cleared for group in selection.groups)
    assert not selection.suspect.any()


def doubted(monkeypatch: pytest.MonkeyPatch, accused: np.ndarray) -> tuple[Selection, Any, Outside]:
    """Some of class 0 are accused, and in doubt; who is, after they were looked at with the rest of it."""
    networks = Outside(monkeypatch)
    monkeypatch.setattr(again, "seen_by", networks.see)
    monkeypatch.setattr(examine, "shared", lambda *_: 0.0)
    before = Selection(accused, accused.astype(np.float32), (Group(0, 20, 4.0, 0.9, int(accused.sum()), 0.9, imprint=0.6),))
    (_, rest), *_ = queue(0, 0, EACH)
    parts = {0: [(Group(0, 0, 4.0, 0.9, int((~accused[:EACH]).sum()), 0.9), rest * ~accused)]}
    worth, selection, left = _sifted(SESSION, ANY, seen(), before, parts, {0}, networks)
    assert selection.suspect is accused and left == set(worth)
    assert sum(networks.absent[f"fold{k + 1}"][accused].all() for k in range(FOLDS)) == 1  # not aside: out of one with its class
    return *_named(SESSION, ANY, seen(), selection, [*worth.values()], left, networks), networks


def test_what_was_accused_is_let_go_where_most_of_the_rest_is_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    found, namer, _ = doubted(monkeypatch, (LABELS == 0) & ~POISON)
    assert found.suspect[POISON].all() and found.suspect[~POISON].sum() <= 2  # who is harder than 98 of 100 joins
    assert namer == (None if found.suspect[~POISON].any() else "part1")  # which was taught what came back
    np.testing.assert_array_equal(found.doubt > 0.5, found.suspect)  # the others are as clean as any


def test_nothing_is_let_go_for_a_rest_that_resembles_few_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside clean-label poison of most of its class the clean images are named after others, too, but not after many."""
    accused, real = (LABELS == 0) & ~POISON, again.examined
    monkeypatch.setattr(again, "examined", lambda *args: (dataclasses.replace(real(*args)[0], spread=0.7), real(*args)[1]))
    found, namer, _ = doubted(monkeypatch, accused)
    np.testing.assert_array_equal(found.suspect, accused)
    assert namer is None and not found.groups[-1].foreign and found.groups[-1].named == 0
    assert dataclasses.replace(found.groups[-1], doubted=False).foreign


def test_what_was_accused_stays_where_a_small_part_of_the_rest_is_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    accused = (LABELS == 0) & (np.arange(len(LABELS)) >= 70)
    found, namer, _ = doubted(monkeypatch, accused)
    assert found.suspect[accused | POISON].all() and found.suspect[~accused & ~POISON].sum() <= 2
    assert namer is None  # it was taught the accused


def test_what_was_accused_rightly_stays_and_costs_no_training_more(monkeypatch: pytest.MonkeyPatch) -> None:
    accused = (LABELS == 0) & (np.arange(len(LABELS)) < 40)  # all of the poison and ten more
    found, namer, networks = doubted(monkeypatch, accused)
    np.testing.assert_array_equal(found.suspect, accused)
    assert namer is None and sorted(networks.absent) == ["class0", "fold1", "fold2", "fold3"]


def test_what_is_put_on_record_accuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an earlier look found of the group that a part was made of."""
    monkeypatch.setattr(again, "shows_trigger", lambda *_: False)
    old = {"named": 0.05, "source": 0.5, "every": 0.6, "carried": 0.4, "doubted": True}
    _, selection, _ = _sifted(SESSION, ANY, seen(), NOBODY, {3: queue(3, 0, 40, **old)}, set(), Outside(monkeypatch))
    assert not selection.suspect.any()
    group = unasked(Group(3, 20, 4.0, 0.9, 40, 0.9, imprint=0.3, content=0.3, alike=0.5, **old), 25)
    assert group == Group(3, 20, 4.0, 0.9, 25, 0.9, imprint=0.3)


def test_a_class_of_which_nothing_can_be_told_is_examined_by_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    networks, aside = Outside(monkeypatch), (LABELS == 5) & (np.arange(len(LABELS)) % EACH < 61)
    accused = Selection(aside, aside.astype(np.float32))
    worth, selection, left = _sifted(SESSION, ANY, seen(), accused, {5: (parts := queue(5, 65, 20))}, set(), networks)
    assert worth[5] is parts and not left and selection is accused


@pytest.mark.parametrize(
    ("content", "named", "foreign"), [(0.2, None, True), (0.2, 0.55, True), (0.2, 0.9, False), (0.09, 0.0, False)]
)
def test_what_gets_its_label_from_a_network_that_never_saw_the_part_is_not_foreign(
    content: float, named: float | None, foreign: bool
) -> None:
    assert Group(0, 20, 4.0, 0.9, 40, 0.9, content=content, named=named).foreign == foreign


def test_too_few_classes_do_not_tell_what_is_typical(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = Outside(monkeypatch)
    for classes in (COMPARED, COMPARED - 1):
        found = foreign_parts(SESSION, seen(), classes <= LABELS, {}, networks)
        assert len(found) == (classes if classes == COMPARED else 0)


@pytest.mark.parametrize(
    ("given", "cosine", "covers", "turned", "worth"),
    [
        ({"alike": 0.5}, 0.0, 0.0, 0.0, True),
        ({}, 0.61, 0.0, 0.0, True),
        ({}, 0.59, 0.06, 0.0, True),
        ({}, 0.0, 0.0, 0.5, True),
        ({}, 0.59, 0.05, 0.49, False),
    ],
)
def test_a_part_that_shows_no_trigger_is_not_worth_a_training(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], cosine: float, covers: float, turned: float, worth: bool
) -> None:
    rises = np.full(CLASSES, turned)
    rises[0] = 0
    assert shows(monkeypatch, queue(0, 0, 30, **given), cosine, covers, rises) == worth


@pytest.mark.parametrize(("size", "worth"), [(40, True), (41, False)])
def test_what_most_of_a_class_share_is_its_content(monkeypatch: pytest.MonkeyPatch, size: int, worth: bool) -> None:
    assert shows(monkeypatch, queue(0, 0, size), 0.0, 1.0, np.ones(CLASSES)) == worth


def shows(monkeypatch: pytest.MonkeyPatch, queue: list[Any], cosine: float, covers: float, rises: np.ndarray) -> bool:
    """Whether it may share a trigger, beside 20 of its class that are accused."""
    monkeypatch.setattr(examine, "shared", lambda *_: cosine)
    monkeypatch.setattr(examine, "beyond_content", lambda *_: [None])
    monkeypatch.setattr(examine, "carried", lambda *_: [covers])
    monkeypatch.setattr(examine, "imprint_by_class", lambda *_, **__: rises)
    ((group, likely),) = queue
    session: Any = SimpleNamespace(source=None, ordered=lambda source: source, runtime=None)
    suspect = (LABELS == 0) & (np.arange(len(LABELS)) >= 80)
    return examine.shows_trigger(session, cast(Any, "trained"), seen(), suspect, group, likely > 0.5)
