"""Named parts: register, create, names. Duplicates raise; an unknown name lists the known ones."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

__all__ = ["Registry", "nearest"]

T = TypeVar("T")
KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


def nearest(word: str, known: Iterable[str]) -> str:
    """The closest known spelling as a hint such as "; did you mean 'lga'?", or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _is_kind(value: object, kind: str) -> bool:
    return isinstance(value, KINDS[kind]) and (kind == "bool" or not isinstance(value, bool))


def _takes_float(annotation: Any) -> bool:
    """Whether a setting is a float, or a float or None; annotations are text where a module imports them from __future__."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return set(text.replace("Optional[float]", "float | None").split(" | ")) in ({"float"}, {"float", "None"})


class Registry(Generic[T]):
    """A table of classes or functions of one kind, by name.

    Args:
        kind: What the entries are, in the singular, for messages ("detector").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, type[T]] = {}
        self._sources: dict[str, str] = {}

    def register(self, name: str, *, source: str = "") -> Callable[[type[Any]], type[Any]]:
        """Class decorator that adds an entry; `source` names its paper."""

        def add(item: type[Any]) -> type[Any]:
            if name in self._items:
                raise ValueError(f"{self.kind} {name!r} is already registered")
            self._items[name] = item
            self._sources[name] = source
            return item

        return add

    def names(self) -> list[str]:
        return sorted(self._items)

    def listing(self) -> str:
        """The names, each with its paper where it has one, for people to read."""
        return ", ".join(f"{name} ({self._sources[name]})" if self._sources[name] else name for name in self.names())

    def get(self, name: str) -> type[T]:
        if name not in self._items:
            raise ValueError(f"no {self.kind} {name!r}; known: {', '.join(self.names())}{nearest(name, self._items)}")
        return self._items[name]

    def defaults(self, name: str) -> dict[str, str]:
        """The settings of the entry `name` that may be left out, each with its default as text."""
        knobs = inspect.signature(self.get(name)).parameters.values()
        return {knob.name: repr(knob.default) for knob in knobs if knob.default is not knob.empty}

    def all_defaults(self, name: str, /, **knobs: Any) -> dict[str, str]:
        """The same, with those of the methods inside the entry so built, which it tells as `inner`."""
        return {**self.defaults(name), **getattr(self.create(name, **knobs), "inner", {})}

    def create(self, name: str, /, **knobs: Any) -> T:
        """Build the entry `name`; an unknown knob raises ValueError naming the known ones. A whole number becomes a float where a
        float is taken, so that entries that are equal are told alike."""
        item, given = self.get(name), dict(knobs)
        parameters = inspect.signature(item).parameters
        known = list(parameters)
        for knob, value in knobs.items():
            if knob not in known:
                raise ValueError(
                    f"{self.kind} {name!r} has no setting {knob!r}; known: {', '.join(known) or 'none'}{nearest(knob, known)}"
                )
            kind = str(parameters[knob].annotation)
            if kind in KINDS and not _is_kind(value, kind):
                raise ValueError(f"{self.kind} {name!r}: {knob} must be {kind}, got {value!r}")
            if _takes_float(parameters[knob].annotation) and _is_kind(value, "int") and abs(value) <= 2**53:  # which is exact
                given[knob] = float(value)
        try:
            return item(**given)
        except TypeError as error:
            raise ValueError(f"{self.kind} {name!r}: {error}") from error


def difference(ours: tuple[str, ...], theirs: tuple[str, ...]) -> str:
    """How two lists of class names differ, in words."""
    if sorted(ours) == sorted(theirs):
        place = next(i for i, (own, other) in enumerate(zip(ours, theirs, strict=True)) if own != other)
        return f"the same {len(ours)} names in another order, number {place} is {ours[place]!r} and should be {theirs[place]!r}"
    sizes = f"{len(ours)} and not {len(theirs)}, " * (len(ours) != len(theirs))
    return f"{sizes}only there: {sorted(set(ours) - set(theirs))[:3]}, missing: {sorted(set(theirs) - set(ours))[:3]}"
