from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


def test_nearest() -> None:
    assert nearest("spectal", ["lga", "spectral"]) == "; did you mean 'spectral'?"
    assert nearest("xyz", ["lga", "spectral"]) == "" and nearest("lga", []) == ""
