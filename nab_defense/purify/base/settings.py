"""Ranges of settings."""

from __future__ import annotations

import math

__all__ = ["in_range"]


def in_range(method: object, *names: str, low: float, high: float = math.inf, ends: str = "[)") -> None:
    """Refuse settings outside a range.

    Args:
        method: Has an attribute of each of the names.
        low, high: Ends of the range.
        ends: Whether they belong to it, as in mathematics: "[)", "()" or "[]".

    Raises:
        ValueError: Names the setting, the range and the value; one that is not finite is in no range."""
    if high < math.inf:
        allowed = f"in {ends[0]}{low:g}, {high:g}{ends[1]}"
    else:
        allowed = f"{'at least' if ends[0] == '[' else 'above'} {low:g}"
    for name in names:
        value = getattr(method, name)
        at_end = (ends[0] == "[" and value == low) or (ends[1] == "]" and value == high)
        if not math.isfinite(value) or not (low < value < high or at_end):
            raise ValueError(f"{name} must be {allowed}, got {value}")
