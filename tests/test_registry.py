from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from typing import Any, Optional

import pytest

from nab_defense.registry import Registry, nearest


@dataclass(frozen=True)
class Part:
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size must be >= 0, got {self.size}")


@pytest.fixture
def parts() -> Registry[Any]:
    parts: Registry[Any] = Registry("part")
    parts.register("wheel", source="arXiv:1")(Part)
    parts.register("axle")(type("Axle", (), {}))
    return parts


def test_registers_lists_and_creates(parts: Registry[Any]) -> None:
    assert parts.names() == ["axle", "wheel"]
    assert parts.get("wheel") is Part and parts.create("wheel", size=3) == Part(3)
    assert parts.listing() == "axle, wheel (arXiv:1)"


def test_a_duplicate_is_refused_and_the_first_stays(parts: Registry[Any]) -> None:
    with pytest.raises(ValueError, match="part 'wheel' is already registered"):
        parts.register("wheel")(type("Other", (), {}))
    assert parts.get("wheel") is Part


def test_an_unknown_name_lists_the_known_and_the_nearest(parts: Registry[Any]) -> None:
    with pytest.raises(ValueError, match="no part 'weel'; known: axle, wheel; did you mean 'wheel'"):
        parts.create("weel")
    with pytest.raises(ValueError, match=r"no part 'zzz'; known: axle, wheel$"):
        parts.get("zzz")


def test_an_unknown_knob_lists_the_known_and_the_nearest(parts: Registry[Any]) -> None:
    with pytest.raises(ValueError, match="part 'wheel' has no setting 'sise'; known: size; did you mean 'size'"):
        parts.create("wheel", sise=2)
    with pytest.raises(ValueError, match="part 'axle' has no setting 'size'; known: none"):
        parts.create("axle", size=2)
    with pytest.raises(ValueError, match="part 'wheel' has no setting 'name'; known: size"):
        parts.create("wheel", **{"name": "axle"})


def test_a_bad_value_keeps_its_own_message(parts: Registry[Any]) -> None:
    with pytest.raises(ValueError, match="size must be >= 0, got -1"):
        parts.create("wheel", size=-1)


def test_a_value_of_the_wrong_type_is_a_users_mistake(parts: Registry[Any]) -> None:
    with pytest.raises(ValueError, match=r"part 'wheel': size must be int, got 'big'"):
        parts.create("wheel", size="big")


@dataclass(frozen=True)
class Knobs:
    share: float = 0.5
    least: float | None = None
    most: Optional[float] = None  # noqa: UP045
    count: int = 1
    given: Any = None


def plain_types() -> type[Any]:
    """As Knobs, with annotations that are types, as without the import from __future__."""
    fields = [("share", float), ("least", float | None), ("most", Optional[float]), ("count", int), ("given", Any)]  # noqa: UP045
    return make_dataclass("Plain", fields, frozen=True)


@pytest.mark.parametrize("entry", [Knobs, plain_types()])
def test_a_whole_number_becomes_a_float_where_one_is_taken(entry: type[Any]) -> None:
    parts: Registry[Any] = Registry("part")
    parts.register("knobs")(entry)
    given = {"share": 16, "least": 2, "most": 3, "count": 4, "given": 5}
    made = parts.create("knobs", **given)
    assert repr(made).endswith("(share=16.0, least=2.0, most=3.0, count=4, given=5)")
    assert given["share"] == 16 and isinstance(given["share"], int)  # what was handed in stays
    left = parts.create("knobs", share=10**400, least=None, most=True, count=4, given=5)  # for the entry to judge
    assert (left.share, left.least, left.most) == (10**400, None, True)


def test_nearest() -> None:
    assert nearest("spectal", ["lga", "spectral"]) == "; did you mean 'spectral'?"
    assert nearest("xyz", ["lga", "spectral"]) == "" and nearest("lga", []) == ""
