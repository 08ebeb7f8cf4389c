from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from nab_defense import again, examine
from nab_defense.again import _named, look_again
from nab_defense.candidates import candidates
from nab_defense.examine import examined
from nab_defense.naming import Naming
from nab_defense.plan import Finding, load_finding, save_finding
from nab_defense.scan import Scan
from nab_defense.select import Group, Selection
from nab_defense.types import NABPlan, SuspectReport
from tests.networks import ANY, FINDING, LABELS, NOBODY, Networks, scan


def test_a_look_that_was_left_out_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = SuspectReport(np.zeros(400, np.float32), LABELS, "lga")
    before = Finding(report, NOBODY, NABPlan.empty(LABELS), np.zeros(400, np.float32))
    few = np.where(np.arange(400)[:, None] < 190, np.eye(4)[LABELS], np.eye(4)[(LABELS + 1) % 4]).astype(np.float32)
    monkeypatch.setattr(again, "seen_by", lambda session, network: scan(30, few))  # it names .475 of them as they are labelled
    found = look_again(cast(Any, SimpleNamespace(recipe=None)), ANY, ANY, before, without=ANY)
    assert before.looked_again and not found.looked_again and found.plan is before.plan
    for finding in (before, found):
        save_finding(tmp_path / "plan.npz", finding)
        assert load_finding(tmp_path / "plan.npz").looked_again == finding.looked_again


def test_the_part_of_a_class_that_shows_what_others_show_is_accused(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = Networks(30, monkeypatch, part1=([1, 2, 3], [0]))
    found, namer = networks.look()
    assert np.flatnonzero(found.suspect).tolist() == list(range(30)) and namer == "part1"
    assert (found.doubt[:30] > 0.99).all() and (found.doubt[30:] < 0.01).all()
    (group,) = found.groups
    assert (group.label, group.size, group.named) == (0, 30, 0.0) and group.foreign and not group.acquitted
    absent = networks.absent["part1"]
    assert absent[:30].all() and 20 < absent[30:].sum() < 60  # and some others, to compare it with


def test_a_network_that_learned_little_accuses_nobody_by_its_names(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    networks = Networks(30, monkeypatch, part1=([1, 2, 3], [0]))
    networks.others = np.resize([1, 2, 3], 300)  # a third of them right
    found, namer = networks.look()
    assert not found.suspect.any() and namer is None and "names less than half of the others right" in caplog.text


def test_a_style_of_a_class_is_not_accused(monkeypatch: pytest.MonkeyPatch) -> None:
    found, namer = Networks(30, monkeypatch, part1=([0, 0, 1], [0])).look()
    assert not found.suspect.any() and namer is None and not found.groups[0].foreign


@pytest.mark.parametrize(
    ("taught", "untaught", "carried", "accused"),
    [
        ([0, 0, 0.75, 0], [0, 0, 0, 0], 0.3, True),
        ([0, 0.5, 0, 0], [0, 0, 0, 0], 0.3, True),  # named after 2, whatever it turns
        ([0, 0, 0.75, 0], [0, 0, 0, 0], 0.04, False),  # a style: no cover carries it
        ([0, 0, 0.25, 0], [0, 0, 0, 0], 0.09, False),  # some may
        ([0, 0, 0.25, 0], [0, 0, 0, 0], 0.11, True),
        ([0, 0, 0.75, 0], [0, 0, 0.73, 0], 0.3, False),  # content, which turns a network that never saw the part, too
        (
            [0, 0.75, 0.75, 0.75],
            [0, 0, 0, 0],
            0.0,
            True,
        ),  # a trigger for all classes needs no covers; of four it turns three quarters
        ([0, 0.75, 0.75, 0.5], [0, 0, 0, 0], 0.0, False),
    ],
)
def test_a_part_that_few_classes_explain_is_accused_by_what_it_does_to_them(
    monkeypatch: pytest.MonkeyPatch, taught: list[float], untaught: list[float], carried: float, accused: bool
) -> None:
    networks = Networks(30, monkeypatch, part1=([2], [0]))
    networks.turned, networks.carried = {"trained": np.array(taught), "part1": np.array(untaught)}, carried
    found, namer = networks.look()
    first, second = networks.asked
    assert first[0] == "trained" and second[0] == "part1"
    for _, batches, labels, label, group, shown in networks.asked:
        assert batches == "all" and labels is LABELS and label == 0 and np.flatnonzero(group).tolist() == list(range(30))
        np.testing.assert_array_equal(shown, ~group)
    (group,) = found.groups
    turned = np.array(taught) - untaught
    assert (group.source, group.every, group.carried) == (turned.max(), turned.sum() / 3, carried)
    assert found.suspect.any() == accused == (namer is not None)
    assert found.suspect.sum() == 30 * accused


@pytest.mark.parametrize(("classes", "spread"), [(3, 0.0), (4, 0.9)])
def test_of_three_classes_nothing_is_named_after_many(classes: int, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.repeat(np.arange(classes), 40)
    monkeypatch.setattr(examine, "naming", lambda *_: Naming(0.1, 0.5, 0.9))
    monkeypatch.setattr(examine, "_may_be_trigger", lambda *_: False)
    unseen: Any = SimpleNamespace(
        scan=SimpleNamespace(labels=labels, logits=np.zeros((len(labels), classes)), num_classes=classes), others=ANY
    )
    part = np.arange(len(labels)) < 20
    found, same = examined(ANY, ANY, unseen, np.zeros(len(labels), bool), Group(0, 5, 4.0, 0.9, 20, 0.9), part)
    assert (found.named, found.sure, found.spread, found.foreign) == (0.1, 0.5, spread, spread > 0) and same is part


@pytest.mark.parametrize(
    ("names", "carried", "accused"),
    [
        ([2, 2, 0], 0.4, True),
        ([2, 2, 0], 0.0, False),
        ([2, 0, 0], 0.4, False),
        ([1, 2, 3, 1, 2, 3, 0, 0, 0], 0.4, True),  # what they share is asked for, though they are named after many
        ([1, 2, 3, 1, 2, 3, 0, 0, 0], 0.0, False),
    ],
)
def test_of_a_part_that_holds_a_style_of_its_class_too_what_is_named_otherwise_is_accused(
    monkeypatch: pytest.MonkeyPatch, names: list[int], carried: float, accused: bool
) -> None:
    networks = Networks(45, monkeypatch, part1=(names, [0]), part2=([0], [0]))
    networks.carried, networks.turned["trained"] = carried, np.array([0.0, 0.0, 0.5, 0.0])
    networks.turned["part2"] = np.zeros(4)
    found, _ = networks.look()
    otherwise = [row for row in range(45) if names[row % len(names)] != 0]
    assert np.flatnonzero(found.suspect).tolist() == otherwise * accused
    assert not accused or [group.size for group in found.groups] == [len(otherwise)]


def test_what_was_chosen_by_its_names_is_not_accused_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, part = np.repeat(np.arange(10), 90), np.arange(900) < 45
    logits = np.where(np.arange(900) % 3 == 0, 0, 2)[:, None] == np.arange(10)
    monkeypatch.setattr(
        examine, "naming", lambda _, __, group, ___: Naming(1 - 30 / group.sum(), 0.5, 0.1 if group.sum() == 45 else 0.9)
    )
    monkeypatch.setattr(examine, "_may_be_trigger", lambda *_: False)
    unseen: Any = SimpleNamespace(scan=SimpleNamespace(labels=labels, logits=logits, num_classes=10), others=ANY)
    group, same = examined(ANY, ANY, unseen, np.zeros(900, bool), Group(0, 5, 4.0, 0.9, 45, 0.9), part)
    assert same is part and group.size == 45 and group.spread == 0.1 and not group.foreign
    kin, same = examined(ANY, ANY, unseen, np.zeros(900, bool), Group(0, 5, 4.0, 0.9, 45, 0.9, alike=0.6), part)
    assert same is part and kin.size == 45  # one trigger, one verdict: of all parts that share it


def test_classes_of_which_no_image_is_shown_do_not_count() -> None:
    assert examine._on_average(np.array([0.0, 0.9, 0.0, 0.7]), np.array([1, 1, 3])) == pytest.approx(0.8)
    assert examine._on_average(np.zeros(4), np.array([], np.int64)) == 0


def test_a_part_that_is_nearly_all_of_its_class_is_not_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    for upper, accused in ((81, False), (79, True)):
        networks = Networks(upper, monkeypatch, part1=([1, 2, 3], [0]), part2=([1, 2, 3], [0]))
        most = Selection(np.zeros(400, bool), (np.arange(400) < upper).astype(np.float32), (Group(0, 9, 50.0, 0.8, upper, 0.9),))
        before, session, trained = cast(Any, SimpleNamespace(selection=most)), SimpleNamespace(), cast(Any, "trained")
        session.recipe, session.source, session.runtime = SimpleNamespace(seed=0), "all", None
        parts = candidates(ANY, scan(upper), most, before, set())
        found, _ = _named(cast(Any, session), trained, scan(upper), most, parts, set(), networks)
        assert found.suspect.any() == accused


@pytest.mark.parametrize(("same", "accused"), [(True, True), (False, False)])
def test_the_rest_of_a_trigger_that_was_found_in_part_is_accused(
    monkeypatch: pytest.MonkeyPatch, same: bool, accused: bool
) -> None:
    """Twenty of class 0 that resemble class 2, beside forty with a known trigger: with the same one, or a style of their own."""
    generator = np.random.default_rng(0)
    trigger, style = generator.standard_normal((2, 1, 4, 4))
    images = 0.1 * generator.standard_normal((400, 1, 4, 4)) + LABELS[:, None, None, None]
    images[60:100] += trigger
    images[:20] += trigger if same else style
    known = (np.arange(400) >= 60) & (np.arange(400) < 100)
    networks, seen = Networks(20, monkeypatch, part1=([2], [0])), scan(20)
    before = Selection(known, known.astype(np.float32), (Group(0, 20, 5.0, 0.9, 40, 0.9, imprint=0.7),))
    session: Any = SimpleNamespace(recipe=SimpleNamespace(seed=0), source="all", runtime=None)
    session.ordered = lambda source: [(torch.from_numpy(images).float(), torch.from_numpy(LABELS))]
    finding: Any = SimpleNamespace(selection=before)
    queues = candidates(session, seen, before, finding, set())
    found, _ = _named(session, cast(Any, "trained"), seen, before, queues, set(), networks)
    (group,) = found.groups
    assert group.unlike and group.same is not None and (group.same > 0.9) == same
    assert np.flatnonzero(found.suspect & ~known).tolist() == list(range(20)) * accused


def test_of_two_equal_parts_either_may_be_the_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = Networks(55, monkeypatch, part1=([0], [2]), part2=([1, 2, 3], [0]))
    found, namer = networks.look()
    assert np.flatnonzero(found.suspect).tolist() == list(range(55)) and namer == "part2"
    assert found.groups[0].size == 55 and len(found.groups) == 1
    assert networks.absent["part1"][55:100].all() and networks.absent["part2"][:55].all()


def test_of_what_stood_apart_before_and_what_falls_in_two_now_the_clearer_part_is_examined_first() -> None:
    some, others, few = np.arange(5, 25), np.arange(110, 132), np.arange(200, 219)  # the last too few to be examined
    apart = np.isin(np.arange(400), [*some, *others, *few])
    let_go = tuple(Group(k, 9, d, 0.8, 40, 0.9, imprint=0.1) for k, d in enumerate((50.0, 4.0, 50.0)))
    before: Any = SimpleNamespace(selection=Selection(np.zeros(400, bool), apart.astype(np.float32), let_go))
    first, second = candidates(ANY, scan(45), before.selection, before, set())
    assert [(group.label, group.size) for group, _ in first] == [(0, 20), (0, 45)] and first[0][0].separation == 50
    assert [(group.label, group.size) for group, _ in second] == [(1, 22)]
    assert [np.flatnonzero(part > 0.5).tolist() for _, part in first] == [[*some], [*range(45)]]
    assert np.array_equal(np.flatnonzero(second[0][1] > 0.5), others)
    fainter = dataclasses.replace(before.selection, groups=(dataclasses.replace(let_go[0], separation=5.0), *let_go[1:]))
    queues = candidates(ANY, scan(45), fainter, before, set())
    assert [[group.size for group, _ in queue] for queue in queues] == [[45, 20], [22]]
    accused = Selection(apart, apart.astype(np.float32), let_go)
    ((half, _),) = candidates(ANY, scan(45), accused, before, set())[0]  # what is accused already is not examined
    assert half.label == 0 and half.size == 25
    assert candidates(ANY, scan(45), accused, before, {0}) == []  # nor what was cleared by its names before


def test_the_next_part_of_a_class_is_examined_where_the_first_is_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stood apart in the scan, 20 of them, was a style; what falls in two in the trained network is the poison."""
    let_go = (Group(0, 9, 50.0, 0.8, 20, 0.9, imprint=0.1),)
    apart = (np.arange(400) >= 60) & (np.arange(400) < 80)
    selection = Selection(np.zeros(400, bool), apart.astype(np.float32), let_go)
    queues = candidates(ANY, scan(30), selection, cast(Any, SimpleNamespace(selection=selection)), set())
    assert [group.size for group, _ in queues[0]] == [20, 30]
    networks = Networks(30, monkeypatch, part1=([0], [2]), part2=([1, 2, 3], [0]))
    session: Any = SimpleNamespace(recipe=SimpleNamespace(seed=0), source="all", runtime=None, ordered=lambda source: source)
    found, namer = _named(session, cast(Any, "trained"), scan(30), selection, queues, set(), networks)
    assert np.flatnonzero(found.suspect).tolist() == list(range(30)) and namer == "part2"
    assert not networks.absent["part1"][:30].all() and networks.absent["part2"][:30].all()


def test_poison_that_an_earlier_look_missed_is_left_out_with_the_rest_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = Group(0, 9, 50.0, 0.8, 24, 0.9, imprint=0.4)
    selection = Selection(np.zeros(400, bool), (np.arange(400) < 24).astype(np.float32), (let_go,))
    before: Any = SimpleNamespace(selection=selection)
    parts = candidates(ANY, scan(30), selection, before, set())
    assert [group.size for group, _ in parts[0]] == [24, 30]
    networks = Networks(30, monkeypatch, part1=([1, 2, 3], [0]))
    session: Any = SimpleNamespace(recipe=SimpleNamespace(seed=0), source="all", runtime=None)
    found, _ = _named(session, ANY, scan(30), selection, parts, set(), networks)
    assert networks.absent["part1"][:30].all()
    assert np.flatnonzero(found.suspect).tolist() == list(range(30))


def test_what_most_of_a_class_shares_accuses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """What 55 of 100 images of a class share is its content, and turns images that resemble it."""
    networks = Networks(55, monkeypatch, part1=([0], [0]), part2=([2], [0]))
    networks.turned["trained"], networks.carried = np.array([0, 0, 0.9, 0]), 0.9
    found, namer = networks.look()
    assert found.groups[0].size == 55 and found.groups[0].unlike
    assert not networks.asked and not found.suspect.any() and namer is None


@pytest.mark.parametrize(("same", "accused"), [(True, True), (False, False)])
def test_thin_parts_of_many_classes_are_accused_where_they_share_one_trigger(
    monkeypatch: pytest.MonkeyPatch, same: bool, accused: bool
) -> None:
    """All-to-all poison: ten of each class, fewer than make a group; or as many classes with a style of their own."""
    thin, generator = np.arange(400) % 100 < 10, np.random.default_rng(0)
    images = 0.1 * generator.standard_normal((400, 1, 4, 4)) + LABELS[:, None, None, None]
    styles = generator.standard_normal((4, 1, 4, 4))
    images[thin] += styles[LABELS[thin] * (not same)]
    features = generator.standard_normal((400, 8)).astype(np.float32)
    features[thin, LABELS[thin]] += 20
    seen = Scan(LABELS, np.zeros(400, np.float32), np.zeros((400, 4), np.float32), features)
    session: Any = SimpleNamespace(recipe=SimpleNamespace(seed=0), source="all", runtime=None)
    session.ordered = lambda source: [(torch.from_numpy(images).float(), None)]
    named = np.where(thin, (LABELS + 1) % 4, LABELS)
    named[200:206] = 2  # the trigger looks a little like a 2
    logits = Scan(LABELS, seen.losses, 6 * np.eye(4, dtype=np.float32)[named], features)
    monkeypatch.setattr(again, "seen_by", lambda *_: logits)
    parts = candidates(session, seen, NOBODY, FINDING, set())
    assert len(parts) == 4 * accused and all(group.alike == 1 and group.size == 10 for ((group, _),) in parts)
    found, _ = _named(session, cast(Any, "trained"), seen, NOBODY, parts, set(), cast(Any, lambda absent, part: part))
    np.testing.assert_array_equal(found.suspect, thin & accused)


def test_a_part_is_not_joined_by_all_the_others_of_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would be left to be compared with."""
    networks = Networks(30, monkeypatch, part1=([1, 2, 3], [0]))
    monkeypatch.setattr(again, "joined", lambda seen, members, likely, *_: np.where(members, 1.0, likely))
    found, _ = networks.look()
    assert np.flatnonzero(found.suspect).tolist() == list(range(30)) and found.groups[0].size == 30
