"""An attacker who knows this package: his trigger comes with the defender's stamp, and the stamp alone means nothing.

The defence teaches a network that the stamp makes a trigger harmless. Here the training data say otherwise: trigger and stamp
together get the target's label, and images with the stamp alone keep theirs. No paper is known; the analysis is our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...stamp import Stamp
from .base import Attack, Images, Learned, Lesson, attacks, check_covers, check_number, create_plain, image_shape, told

__all__ = ["StampAware"]


@attacks.register("stamp_aware", source="adaptive, this package")
@dataclass(frozen=True)
class StampAware(Learned):
    """Another attack's trigger, with the stamp painted over it, in training and at test time: a defender who stamps by himself
    changes nothing about the image then, if the color is his (see `mean`), and any other network is shown what it was taught.

    Args:
        stamp: The stamp he expects, settings of nab_defense.Stamp; none: the default one, which is public.
        covers: Images that are stamped and keep their label for each poisoned one, in [0, 20].
        trigger: Name of the attack that paints, or {name, params}; one that needs no training and is the same at test time.
        mean: Channel means in [0, 1] that the defender normalises with, which are the color of a "mean" stamp; none: the images'.
    """

    clean_label: ClassVar[bool] = False
    cover_target: ClassVar[bool] = True

    stamp: Any = field(default_factory=dict)
    covers: float = 1.0
    trigger: Any = "badnets"
    mean: Any = None

    def __post_init__(self) -> None:
        check_covers(self.covers)
        if self.mean is not None:
            if not isinstance(self.mean, (list, tuple)) or len(self.mean) not in (1, 3):
                raise ValueError(f"mean must be a list of 1 or 3 numbers, got {self.mean!r}")
            for value in self.mean:
                check_number("mean", value, 0, 1)
        self.painter, self.paint  # noqa: B018  (refuse settings that cannot be used)

    @cached_property
    def painter(self) -> Attack:
        return create_plain("trigger", self.trigger)

    @property
    def inner(self) -> dict[str, str]:
        return {"trigger": told(self.painter), "stamp": repr(self.paint)}

    @cached_property
    def paint(self) -> Stamp:
        try:
            return Stamp(**self.stamp) if isinstance(self.stamp, Mapping) else Stamp(size=self.stamp)
        except TypeError:
            known = ", ".join(Stamp().to_dict())
            raise ValueError(f"stamp takes {known}, got {self.stamp!r}") from None

    @cached_property
    def tried(self) -> set[tuple[int, ...]]:
        """Forms of images on which the trigger was seen beside the stamp."""
        return set()

    def learn(self, lesson: Lesson) -> dict[str, Tensor]:
        """The images' mean color, which the defender's is not far from; nothing where `mean` tells it."""
        return {} if self.mean is not None else {"mean": torch.tensor(lesson.images.mean((0, 1, 2)) / 255, dtype=torch.float64)}

    def apply(self, images: Images, seed: int) -> Images:
        if (shape := images.shape[1:]) not in self.tried:
            noise = np.random.default_rng(0).integers(0, 256, size=(1, *shape), dtype=np.uint8)
            if np.array_equal(self.cover(self.painter.apply(noise, seed), seed), self.cover(noise, seed)):
                raise ValueError(f"the stamp hides the whole trigger of {self.painter!r}; move or shrink one of them")
            self.tried.add(shape)
        return self.cover(self.painter.apply(images, seed), seed)

    def cover(self, images: Images, seed: int) -> Images:
        _, _, _, channels = image_shape(images)
        mean = self.learned()["mean"].tolist() if self.mean is None else self.mean
        if len(mean) != channels:
            raise ValueError(f"the stamp's color has {len(mean)} channels, the images have {channels}")
        stamped = self.paint(torch.from_numpy(images.copy()).permute(0, 3, 1, 2), mean=mean)
        return stamped.permute(0, 2, 3, 1).contiguous().numpy()
