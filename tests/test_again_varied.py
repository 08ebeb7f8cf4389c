"""Parts of classes, named by networks that were trained on varied images: triggers that change the whole image."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nab_defense import again
from nab_defense.again import _whatever_was_done
from nab_defense.data.transforms import VARIED
from nab_defense.naming import naming
from nab_defense.select import Group, Selection
from tests.networks import NOBODY, Networks, scan


class Varied(Networks):
    """As Networks; `made` are the augmentations of those that were trained."""

    def __init__(self, upper: int, monkeypatch: pytest.MonkeyPatch, **names: tuple[list[int], list[int]]) -> None:
        super().__init__(upper, monkeypatch, **names)
        monkeypatch.setattr(again, "MANY", 4)
        self.made: list[str] = []

    def __call__(self, absent: np.ndarray, part: str, augment: str = "") -> Any:
        self.made.append(augment)
        return super().__call__(absent, part)

    def ask(self, alike: float = 0.0) -> tuple[Selection, Any]:
        """Of the first samples of class 0."""
        session: Any = SimpleNamespace(recipe=SimpleNamespace(seed=0))
        likely = np.where(np.arange(400) < self.upper, 1.0, 0.0)
        group = Group(0, 0, 5.0, 0.9, self.upper, 0.5, imprint=0.1, alike=alike)
        return _whatever_was_done(session, scan(self.upper), NOBODY, [(group, likely)], self)


def test_a_part_that_is_named_after_all_classes_is_accused(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = Varied(30, monkeypatch, varied1=([1, 2, 3], [0]))
    found, namer = networks.ask()
    assert np.flatnonzero(found.suspect).tolist() == list(range(30)) and namer == "varied1" and networks.made == [VARIED]
    (group,) = found.groups
    assert group.foreign and not group.acquitted and group.imprint == 0.1 and group.varied > 0.9
    assert networks.absent["varied1"][:30].all() and 20 < networks.absent["varied1"][30:].sum() < 60


@pytest.mark.parametrize("names", [[0, 0, 1], [0, 1, 2, 3]])
def test_a_part_that_keeps_its_name_is_let_go(names: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    networks = Varied(40, monkeypatch, varied1=(names, [0]))
    assert networks.ask() == (NOBODY, None) and len(networks.made) == 1


@pytest.mark.parametrize(("rest", "accused"), [([1, 2, 3], True), ([2, 2, 2, 1], False)])
def test_where_a_part_loses_its_name_the_rest_is_asked(rest: list[int], accused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = Varied(55, monkeypatch, varied1=([2], [0]), varied2=([0], rest))
    found, namer = networks.ask()
    assert np.flatnonzero(found.suspect).tolist() == (list(range(55, 100)) if accused else [])
    assert namer == ("varied2" if accused else None) and networks.made == [VARIED, VARIED]
    assert networks.absent["varied2"][55:100].all() and not networks.absent["varied2"][:55].all()


def test_nobody_is_accused_who_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = Varied(30, monkeypatch, varied1=([1, 2, 3], [0]))
    assert networks.ask(alike=0.5) == (NOBODY, None)  # asked otherwise
    monkeypatch.setattr(again, "MANY", 5)
    assert networks.ask() == (NOBODY, None) and not networks.made  # of few classes names are soon many
    monkeypatch.setattr(again, "MANY", 4)
    networks.others = np.resize([1, 2, 3], 300)
    assert networks.ask() == (NOBODY, None) and len(networks.made) == 1  # a third of the others are named right
    nearly_all = Varied(85, monkeypatch, varied1=([1, 2, 3], [0]))
    assert nearly_all.ask() == (NOBODY, None)


def test_entropies_of_few_samples_are_not_too_low() -> None:
    rng, spreads = np.random.default_rng(0), {}
    labels = np.r_[np.zeros(30, np.int64), rng.integers(1, 10, 2000)]
    others = np.arange(len(labels)) >= 30
    for unbiased in (False, True):
        found = []
        for _ in range(40):
            names = np.r_[rng.integers(1, 10, 30), labels[30:]]
            logits = np.eye(10, dtype=np.float32)[names]
            found.append(naming(logits, labels, ~others, others, unbiased=unbiased).spread)
        spreads[unbiased] = float(np.mean(found))
    assert spreads[False] < 0.96 and abs(spreads[True] - 1) < 0.02
