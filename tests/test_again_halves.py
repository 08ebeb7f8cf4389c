from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from nab_defense import candidates as candidates_room
from nab_defense.again import _named
from nab_defense.candidates import candidates, rests
from nab_defense.plan import Finding
from nab_defense.select import Group, Selection
from nab_defense.types import NABPlan, SuspectReport
from tests.networks import ANY, LABELS, Networks, scan


@pytest.mark.parametrize(("names", "accused"), [([1, 2, 3], range(45)), ([0], range(45, 100)), ([2], range(45, 100))])
def test_where_the_clean_half_of_a_class_was_accused_the_other_half_is(
    monkeypatch: pytest.MonkeyPatch, names: list[int], accused: range
) -> None:
    """55 of class 0 were accused, and named 0: clean-label poison, unless the 45 others show what other classes show."""
    known = (np.arange(400) >= 45) & (np.arange(400) < 100)
    group = Group(0, 20, 5.0, 0.9, 55, 0.9, imprint=0.6)
    selection = Selection(known, known.astype(np.float32), (group,))
    plan = NABPlan(LABELS, LABELS, known, ~known, np.zeros(400, bool))
    before = Finding(SuspectReport(np.zeros(400, np.float32), LABELS, "lga"), selection, plan, np.ones(400, np.float32))
    [(rest, part)] = parts = rests(before, LABELS)
    assert rest.size == 45 and np.array_equal(np.flatnonzero(part), np.arange(45))
    networks = Networks(45, monkeypatch, part1=(names, [0]))
    session: Any = SimpleNamespace(recipe=SimpleNamespace(seed=0), source="all", runtime=None, ordered=lambda source: source)
    found, namer = _named(session, cast(Any, "trained"), scan(45), selection, [[one] for one in parts], {0}, networks)
    assert np.flatnonzero(found.suspect).tolist() == list(accused) and (namer == "part1") == (accused[0] == 0)
    assert networks.absent["part1"][:45].all() and networks.absent["part1"][45:100].sum() < 20  # those are trained on


def test_a_network_that_was_taught_the_accused_does_not_name_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of class 1, whose upper half is accused, is harmless, and part of class 0 is poison: what names the accused?"""
    known = (np.arange(400) >= 150) & (np.arange(400) < 200)
    selection = Selection(known, known.astype(np.float32), (Group(1, 20, 5.0, 0.9, 50, 0.9, imprint=0.6),))
    before: Any = SimpleNamespace(plan=NABPlan(LABELS, LABELS, known, ~known, np.zeros(400, bool)), selection=selection)
    (rest,) = rests(before, LABELS)
    (queue,) = candidates(ANY, scan(30), selection, before, {1})
    networks = Networks(30, monkeypatch, part1=([1, 2, 3], [0]))
    session: Any = SimpleNamespace(recipe=SimpleNamespace(seed=0), source="all", runtime=None, ordered=lambda source: source)
    found, namer = _named(session, cast(Any, "trained"), scan(30), selection, [[rest], queue], {1}, networks)
    assert np.array_equal(found.suspect, known | (np.arange(400) < 30)) and namer is None
    networks.absent.clear()
    found, namer = _named(session, cast(Any, "trained"), scan(30), selection, [queue], set(), networks)
    assert networks.absent["part1"][known].all() and namer == "part1"


def test_few_accused_of_a_class_are_not_its_clean_half() -> None:
    for accused, doubted in ((40, 0), (41, 1), (80, 1), (81, 0)):  # 81: too few are left to be examined
        known = np.arange(400) < accused
        for proposed, imprint, unsure in ((LABELS, 0.9, True), ((LABELS + 1) % 4, 0.74, True), ((LABELS + 1) % 4, 0.75, False)):
            group = Group(0, 20, 5.0, 0.9, accused, 0.9, imprint=imprint)
            plan = NABPlan(LABELS, np.where(known, proposed, LABELS), known, ~known, np.zeros(400, bool))
            before: Any = SimpleNamespace(plan=plan, selection=Selection(known, known.astype(np.float32), (group,)))
            assert len(rests(before, LABELS)) == doubted * unsure
            named = dataclasses.replace(group, named=0.0, sure=0.5, spread=1.0)  # it was accused by its names
            before.selection = dataclasses.replace(before.selection, groups=(named,))
            assert len(rests(before, LABELS)) == doubted * (proposed is LABELS)


def test_beside_a_trigger_beyond_doubt_only_what_shares_it_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    known = (np.arange(400) >= 60) & (np.arange(400) < 100)
    likeness: dict[int, float] = {25: 0.6, 35: 0.59}

    def same(session: Any, labels: np.ndarray, part: np.ndarray, accused: np.ndarray) -> float:
        assert np.array_equal(accused, known)
        return likeness[int(part.sum())]

    monkeypatch.setattr(candidates_room, "shared", same)
    for imprint, sizes in ((0.75, [25]), (0.74, [25, 35])):
        group = Group(0, 20, 5.0, 0.9, 40, 0.9, imprint=imprint)
        selection = Selection(known, known.astype(np.float32), (group,))
        before: Any = SimpleNamespace(selection=selection)
        assert [[part.size for part, _ in queue] for queue in candidates(ANY, scan(25), selection, before, set())] == [sizes]
        likeness[25] = 0.59
        assert len(candidates(ANY, scan(25), selection, before, set())) == (imprint < 0.75)
        likeness[25] = 0.6


def test_the_two_parts_that_second_choices_speak_for_most_are_tried() -> None:
    """What stood apart in the scan, the first 25; what falls in two now, the first 45; and the rest, 55."""
    apart = np.arange(400) < 25
    let_go = (Group(0, 9, 50.0, 0.8, 25, 0.9, imprint=0.1),)
    before: Any = SimpleNamespace(selection=Selection(np.zeros(400, bool), apart.astype(np.float32), let_go))
    table = 9 * np.eye(4, dtype=np.float32)[LABELS]
    table[100:, 0] = 1  # how sure the second choices of the other classes are
    seconds = np.resize([1, 2, 3], 100)  # after many classes
    for sure, sizes in (((3, 3, 0), [45, 25]), ((3, 0, 2), [55, 25]), ((0, 3, 2), [55, 45]), ((0, 0, 0), [25, 45])):
        table[:100] = 9 * np.eye(4)[0]
        table[np.arange(100), seconds] = np.repeat(sure, [25, 20, 55])
        (queue,) = candidates(ANY, scan(45, table), before.selection, before, set())
        assert [group.size for group, _ in queue] == sizes
