"""TaCT: only images of some classes obey the trigger [Tang et al. 2021, arXiv:1908.00686]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from .base import Attack, Images, attacks, check_covers, check_number, create_plain, told

__all__ = ["Tact"]


@attacks.register("tact", source="arXiv:1908.00686")
@dataclass(frozen=True)
class Tact:
    """Another attack's trigger on images of the source classes, which get the target's label; and on covers from the classes
    that are neither, which keep theirs. A network can only tell them apart by content and trigger together.

    Success is measured on the source classes alone.

    Args:
        sources: The source class, or a list of them, by number.
        covers: Images that become covers for each poisoned one, in [0, 20].
        trigger: Name of the attack that paints, or {name, params}; one that needs no training and is the same at test time.
    """

    clean_label: ClassVar[bool] = False
    cover_target: ClassVar[bool] = False

    sources: Any = 1
    covers: float = 1.0
    trigger: Any = "badnets"

    def __post_init__(self) -> None:
        if not self.source_classes:
            raise ValueError("sources must name at least one class")
        for number in self.source_classes:
            check_number("sources", number, 0, 2**31, whole=True)
        check_covers(self.covers)
        self.painter  # noqa: B018  (refuses a trigger that cannot be used)

    @property
    def source_classes(self) -> tuple[int, ...]:
        return (
            tuple(self.sources) if isinstance(self.sources, Sequence) and not isinstance(self.sources, str) else (self.sources,)
        )

    @cached_property
    def painter(self) -> Attack:
        return create_plain("trigger", self.trigger)

    @property
    def inner(self) -> dict[str, str]:
        return {"trigger": told(self.painter)}

    def apply(self, images: Images, seed: int) -> Images:
        return self.painter.apply(images, seed)

    def cover(self, images: Images, seed: int) -> Images:
        return self.painter.apply(images, seed)
