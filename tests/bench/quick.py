"""Attacks that are taught in seconds, for tests: on digits, with few epochs."""

from __future__ import annotations

from functools import cache
from typing import Any

from nab_defense.bench.attacks import Attack, create
from nab_defense.bench.trigger import prepared
from nab_defense.data.sources import Source, open_source

__all__ = ["QUICK", "TARGET", "digits", "ready"]

TARGET = 3
QUICK: dict[str, dict[str, Any]] = {
    "label_consistent": {"epochs": 2, "steps": 4},
    "narcissus": {"epochs": 2, "rounds": 10},
    "ssba": {"epochs": 1},
    "input_aware": {"mask_epochs": 1, "epochs": 2},
    "wanet": {"covers": 1},
}


@cache
def digits() -> Source:
    return open_source("digits")


@cache
def ready(name: str) -> Attack:
    """The attack on digits with class 3 for its target, taught where it has to be."""
    return prepared(create(name, **QUICK.get(name, {})), digits(), target=TARGET, seed=0)
