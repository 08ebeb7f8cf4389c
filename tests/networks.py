"""Networks trained without a part of a class, for tests of the second look."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nab_defense import again, examine
from nab_defense.again import _named
from nab_defense.candidates import candidates
from nab_defense.content import beyond_content
from nab_defense.scan import Scan
from nab_defense.select import Selection

LABELS = np.repeat(np.arange(4), 100)
NOBODY = Selection(np.zeros(400, bool), np.zeros(400, np.float32))
ANY: Any = None
FINDING: Any = SimpleNamespace(selection=NOBODY)


def scan(upper: int, logits: np.ndarray | None = None) -> Scan:
    """Class 0 falls in two, its first `upper` samples and the others; the other classes are one hump."""
    features = np.random.default_rng(0).standard_normal((400, 2)).astype(np.float32)
    features[:upper, 0] += 20
    table = np.zeros((400, 4), np.float32) if logits is None else logits
    return Scan(LABELS, np.zeros(400, np.float32), table, features)


class Networks:
    """Stands for networks trained without a part of class 0: what each names the first and the other samples of that class."""

    def __init__(self, upper: int, monkeypatch: pytest.MonkeyPatch, **names: tuple[list[int], list[int]]) -> None:
        self.upper, self.names, self.absent, self.asked = upper, names, {}, []
        self.others = LABELS[100:]  # what they name the other classes
        self.turned, self.carried = {"trained": np.zeros(4), "part1": np.zeros(4)}, 0.0
        monkeypatch.setattr(again, "seen_by", self.read)
        monkeypatch.setattr(examine, "imprint_by_class", self.imprint)
        monkeypatch.setattr(examine, "carried", lambda *_: [self.carried])
        monkeypatch.setattr(examine, "beyond_content", self.shared)

    def __call__(self, absent: np.ndarray, part: str) -> Any:
        self.absent[part] = absent
        return part

    def read(self, _: object, part: str) -> Scan:
        first, rest = self.names[part]
        named = np.r_[np.resize(first, self.upper), np.resize(rest, 100 - self.upper), self.others]
        return scan(self.upper, 6 * np.eye(4, dtype=np.float32)[named])

    def shared(self, batches: Any, labels: np.ndarray, groups: list[np.ndarray]) -> Any:
        return groups if batches == "all" else beyond_content(batches, labels, groups)  # without images: who they are

    def imprint(self, network: str, *given: Any, shown: np.ndarray, **rest: Any) -> np.ndarray:
        self.asked.append((network, *given, shown))
        return self.turned[network]

    def look(self) -> tuple[Selection, Any]:
        session: Any = SimpleNamespace(recipe=SimpleNamespace(seed=0))
        session.source, session.runtime, session.ordered = "all", None, lambda source: source
        trained: Any = "trained"
        seen = scan(self.upper)
        return _named(session, trained, seen, NOBODY, candidates(session, seen, NOBODY, FINDING, set()), set(), self)
