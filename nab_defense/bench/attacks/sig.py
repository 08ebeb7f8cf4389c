"""SIG: a horizontal sine wave on images of the target class, labels untouched [Barni et al. 2019, arXiv:1902.11237]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from .base import Images, attacks, check_number, image_shape, to_uint8

__all__ = ["Sig"]


def wave(width: int, *, delta: float, frequency: float) -> NDArray[np.float64]:
    """delta * sin(2 pi j frequency / W) for the columns j = 0..W-1, (W,), in grey levels.

    The paper counts columns from 1; counting from 0 shifts the wave by one pixel and nothing else.
    """
    return delta * np.sin(2 * np.pi * frequency * np.arange(width) / width)


@attacks.register("sig", source="arXiv:1902.11237")
@dataclass(frozen=True)
class Sig:
    """A sine wave added to every row.

    Args:
        delta: Amplitude in grey levels, in [1, 255].
        frequency: Periods across the image, in [0.5, 1024]. Above half of the image's columns they fold back: 6 periods on 8
            columns are 2, with the sign turned.
    """

    clean_label: ClassVar[bool] = True

    delta: float = 20.0
    frequency: float = 6.0

    def __post_init__(self) -> None:
        check_number("delta", self.delta, 1, 255)
        check_number("frequency", self.frequency, 0.5, 1024)

    def apply(self, images: Images, seed: int) -> Images:
        _, _, width, _ = image_shape(images)
        signal = wave(width, delta=self.delta, frequency=self.frequency)
        if np.abs(signal).max() < 0.5:  # sampled at its zeros only, as 6 periods on 12 columns are
            raise ValueError(f"a wave of frequency {self.frequency:g} vanishes on images {width} px wide; choose another")
        return to_uint8(images + signal[None, None, :, None])
