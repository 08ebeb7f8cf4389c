from __future__ import annotations

import numpy as np

from nab_defense.passes import clear, clearest, confirmed, judged, overfull, settled
from nab_defense.select import Group, Selection

LABELS = np.array([3, 3, 3, 3, 1, 1])


def test_what_is_known_stays_when_more_of_its_class_is_let_go() -> None:
    labels, known = np.array([3, 3, 3, 1]), np.array([True, False, False, False])
    seen = Selection(
        np.array([True, True, False, False]), np.array([1, 0.9, 0.1, 0], np.float32), (Group(3, 0, 4.0, 0.9, 30, 0.9),)
    )
    assert confirmed(seen, labels, {3: 0.4}, known=known).suspect.tolist() == [True, False, False, False]
    assert confirmed(seen, labels, {3: 0.6}, known=known).suspect.tolist() == [True, True, False, False]
    assert confirmed(seen, labels, {3: 0.4}).suspect.sum() == 0


def test_most_of_a_class_must_share_a_trigger_beyond_doubt() -> None:
    labels = np.repeat([3, 1], 100)
    for size, imprint, accused in ((60, 0.5, True), (61, 0.74, False), (61, 0.75, True)):
        likely = (np.arange(200) < size).astype(np.float32)
        seen = Selection(likely > 0.5, likely, (Group(3, 0, 4.0, 0.9, size, 0.9),))
        found = confirmed(seen, labels, {3: imprint})
        assert found.suspect.sum() == size * accused and found.groups[0].share == size / 100
        assert clearest(found, labels, [seen]).groups[0].acquitted is not accused


def test_a_group_in_doubt_is_judged_by_the_last_passes() -> None:
    assert clear({0: 0.75, 4: 0.9}) and not clear({0: 0.9, 4: 0.74}) and not clear({})
    assert judged([{0: 0.1}, {0: 0.2}, {0: 0.8}]) == {0: 0.8}
    assert judged([{0: 0.9}, {0: 0.1}, {0: 0.6, 4: 0.3}, {0: 0.7, 4: 0.9}, {0: 0.2, 4: 0.6}]) == {0: 0.6, 4: 0.6}
    assert judged([{0: 0.9}, {}]) == {}
    assert judged([{0: 0.3}, {0: 0.3}, {0: 0.3, 4: 0.6}]) == {0: 0.3, 4: 0.0}  # two passes of three saw nothing in 4


def seen(separation: float, doubt: list[float], imprint: float | None = None, label: int = 3, valley: float = 0.9) -> Selection:
    """A pass on which the class fell in two like this."""
    likely = np.array(doubt, np.float32)
    return Selection(likely > 0.5, likely, (Group(label, 0, separation, valley, 30, 0.9, imprint),))


def test_a_group_that_was_let_go_is_taken_where_it_stood_apart_most() -> None:
    passes = [
        seen(9.0, [1, 1, 1, 0, 0, 0], valley=0.0),  # no valley: it did not stand apart
        seen(5.0, [0.9, 0.9, 0.9, 0, 0, 0], valley=0.7),  # little of one
        seen(4.0, [0.9, 0.1, 0, 0, 0, 0]),
        seen(8.0, [0.9, 0, 0, 0.9, 0, 0], imprint=0.9),  # another group of the class, which is known
        seen(3.0, [0.9, 0.9, 0.8, 0, 0, 0.7]),
    ]
    last = confirmed(passes[-1], LABELS, {3: 0.2})
    taken = clearest(last, LABELS, passes)
    np.testing.assert_allclose(taken.doubt, [0.9, 0.1, 0, 0, 0, 0.7])  # of the other class as it is now
    assert taken.groups[0].separation == 4 and taken.groups[0].imprint == 0.2 and taken.groups[0].acquitted
    assert not taken.suspect[LABELS == 3].any() and last.doubt[1] == np.float32(0.9)
    accused = confirmed(passes[-1], LABELS, {3: 0.8})
    same = clearest(accused, LABELS, passes)
    assert same.groups == accused.groups and np.array_equal(same.doubt, accused.doubt)


def suspects(*rows: int) -> Selection:
    mask = np.isin(np.arange(1000), rows)
    return Selection(mask, mask.astype(np.float32))


def test_settled_is_an_overlap_of_98_percent_of_somebody() -> None:
    fifty = suspects(*range(50))
    assert settled(fifty, fifty)
    assert settled(fifty, suspects(*range(49))) and settled(suspects(*range(49)), fifty)
    assert not settled(fifty, suspects(*range(48)))
    assert not settled(fifty, suspects(*range(1, 51)))
    assert not settled(suspects(), suspects()) and not settled(suspects(), fifty)


def test_most_of_a_class_is_more_than_three_fifths_of_it() -> None:
    labels = np.repeat([0, 2], 10)
    assert not overfull(np.arange(20) < 6, labels) and overfull(np.arange(20) < 7, labels)
    assert overfull(np.arange(20) >= 13, labels) and not overfull(np.zeros(20, bool), labels)
