from __future__ import annotations

import pytest


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a method makes is taken, and called repaired; for tests of what happens then."""
    monkeypatch.setattr("nab_defense.purify.base.choice.LEAST_GAIN", -1.0)
    monkeypatch.setattr("nab_defense.purify.base.choice.REPAIRED", 2.0)
