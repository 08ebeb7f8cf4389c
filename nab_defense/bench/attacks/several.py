"""Several attacks at once, each on images of its own and each with its own target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from .base import (
    AsymmetricAttack,
    Attack,
    Images,
    JointAttack,
    Learned,
    LearnedAttack,
    Lesson,
    attacks,
    create_inner,
    told,
    under,
)

__all__ = ["Several"]


@attacks.register("several")
@dataclass(frozen=True)
class Several(Learned):
    """The attacks share the poison rate in equal parts. The first leads to the target, the next to the class after it, and so on,
    unless one names a target of its own. In the test each paints an equal part of the images.

    Args:
        triggers: The attacks: names, or {name, params, target}, at least two.
    """

    clean_label: ClassVar[bool] = False

    triggers: Any = ("badnets", "blend")

    def __post_init__(self) -> None:
        if not isinstance(self.triggers, Sequence) or isinstance(self.triggers, str) or len(self.triggers) < 2:
            raise ValueError(f"triggers must be a list of at least two attacks, got {self.triggers!r}")
        if any(isinstance(create_inner("triggers", given)[0], JointAttack) for given in self.triggers):
            raise ValueError("triggers cannot hold several once more; list all attacks at one level")

    @cached_property
    def members(self) -> list[tuple[Attack, int | None]]:
        """Each attack with what it has learned, and its own target or None."""
        members = []
        for number, given in enumerate(self.triggers):
            member, target = create_inner("triggers", given)
            own = under(self.tensors, f"{number}.")
            members.append((member.taught(own) if own and isinstance(member, LearnedAttack) else member, target))
        return members

    @property
    def inner(self) -> dict[str, str]:
        return {"triggers": repr([(told(member), target) for member, target in self.members])}

    def parts(self, target: int | None, num_classes: int) -> list[tuple[Attack, int | None]]:
        goals = [None if target is None else (target + number) % num_classes for number in range(len(self.members))]
        return [(member, goal if own is None else own) for (member, own), goal in zip(self.members, goals, strict=True)]

    def learn(self, lesson: Lesson) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for number, (member, goal) in enumerate(self.parts(lesson.target, lesson.num_classes)):
            if isinstance(member, LearnedAttack):
                learned = member.learn(replace(lesson, target=goal))
                tensors |= {f"{number}.{name}": value for name, value in learned.items()}
        return tensors

    def apply(self, images: Images, seed: int) -> Images:
        """All triggers, one over the other."""
        for member, _ in self.members:
            images = member.apply(images, seed)
        return images

    def at_test(self, images: Images, seed: int) -> Images:
        for member, _ in self.members:
            images = member.at_test(images, seed) if isinstance(member, AsymmetricAttack) else member.apply(images, seed)
        return images
