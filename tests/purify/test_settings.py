"""Settings out of range are refused in one line before anything starts, whichever way a method is made."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nab_defense.purify import purifiers

COUNTS = {name: ("steps", "rounds", "batch_size") for name in ("ibau", "polarizer", "distill", "finetune", "ft_sam", "rnp")}
COUNTS |= {"ibau": (*COUNTS["ibau"], "terms"), "rnp": (*COUNTS["rnp"], "recover_steps"), "clp": ("rounds",)}
FREE = {"ibau": {"form"}}  # of a range: what the registry sees to, besides bool


@pytest.mark.parametrize(
    ("method", "setting", "value", "allowed"),
    [
        ("ibau", "lr", 0, "above 0"),
        ("ibau", "rate", -0.1, "above 0"),
        ("ibau", "fraction", 1, "in (0, 1)"),
        ("ibau", "hold", -5, "at least 0"),
        ("polarizer", "fraction", 0, "in (0, 1)"),
        ("polarizer", "hold", -5, "at least 0"),
        ("distill", "first", -0.1, "in [0, 1]"),
        ("distill", "head", 1.1, "in [0, 1]"),
        ("distill", "temperature", 0, "above 0"),
        ("distill", "weight_decay", -1, "at least 0"),
        ("distill", "fraction", 1, "in [0, 1)"),
        ("finetune", "momentum", 1, "in [0, 1)"),
        ("finetune", "weight_decay", -1, "at least 0"),
        ("ft_sam", "smoothing", 2, "in [0, 1)"),
        ("ft_sam", "rho", -2, "at least 0"),
        ("clp", "strictest", -1, "in [0, 5]"),
        ("clp", "strictest", 6, "in [0, 5]"),
        ("rnp", "mask_lr", 0, "above 0"),
        ("rnp", "share", 1, "in [0, 1)"),
        ("rnp", "hold", -5, "at least 0"),
        *((method, setting, 0, "at least 1") for method, names in COUNTS.items() for setting in names),
    ],
)
def test_out_of_range(method: str, setting: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError) as caught:
        purifiers.create(method, **{setting: value})
    given = value if setting in COUNTS[method] else float(value)  # as all that takes floats
    assert str(caught.value) == f"{setting} must be {allowed}, got {given}"


@pytest.mark.parametrize("method", purifiers.names())
def test_every_number_has_a_range_and_what_is_not_finite_is_in_none(method: str) -> None:
    numbers = {name for name, default in purifiers.defaults(method).items() if default not in ("True", "False")}
    assert numbers - FREE.get(method, set()) - set(COUNTS[method])
    for setting in sorted(numbers - FREE.get(method, set()) - set(COUNTS[method])):
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match=f"^{setting} must be .*, got (nan|inf)$"):
                purifiers.create(method, **{setting: value})


def test_the_ends_that_belong_to_a_range() -> None:
    made: Any = purifiers.create("distill", first=0, last=1, weight_decay=0, fraction=0, steps=1)
    assert (made.first, made.last, made.weight_decay, made.fraction, made.steps) == (0, 1, 0, 0, 1)
    assert purifiers.create("clp", strictest=5.0) != purifiers.create("clp", strictest=0.0)
