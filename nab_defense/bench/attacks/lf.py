"""LF: a smooth, universal trigger of low frequencies alone [Zeng et al. 2021, arXiv:2104.03413]."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .base import Images, attacks, check_number, image_shape, to_uint8

__all__ = ["LowFrequency"]


@lru_cache(maxsize=16)
def smooth_field(height: int, width: int, channels: int, *, waves: int, field_seed: int) -> NDArray[Any]:
    """(H, W, C) float64, largest magnitude 1: sum of a_uvc cos(pi u (i + 1/2) / H) cos(pi v (j + 1/2) / W), u, v < waves.

    The a_uvc are normal, and a_00c = 0: a shift of all pixels alike is what brightness augmentation takes back. The cosines are
    those of the discrete cosine transform, so it holds no other frequencies; and it is one picture at all sizes. Read-only.
    """
    weights = np.random.default_rng(field_seed).normal(size=(waves, waves, 3))[..., :channels]
    weights[0, 0] = 0
    rows, columns = (np.cos(np.pi * np.outer(np.arange(edge) + 0.5, np.arange(waves)) / edge) for edge in (height, width))
    field = np.einsum("iu,jv,uvc->ijc", rows, columns, weights)
    field /= np.abs(field).max()
    field.setflags(write=False)
    return field


@attacks.register("lf", source="arXiv:2104.03413")
@dataclass(frozen=True)
class LowFrequency:
    """image + eps * field, clipped.

    The paper searches its field with a clean network, under a low-pass filter, until it also turns that network; ours is drawn
    at random from the lowest cosines: as smooth, nothing to train, and by itself it turns nobody.

    Args:
        eps: Largest change of a pixel, in grey levels, in [1, 255].
        waves: Cosines along each side, in [2, 16]; the fastest has (waves - 1) / 2 periods.
        field_seed: Seed of the field; the attacker's secret, the same in training and test.
    """

    clean_label: ClassVar[bool] = False

    eps: float = 32.0
    waves: int = 4
    field_seed: int = 0

    def __post_init__(self) -> None:
        check_number("eps", self.eps, 1, 255)
        check_number("waves", self.waves, 2, 16, whole=True)
        check_number("field_seed", self.field_seed, 0, 2**32 - 1, whole=True)

    def apply(self, images: Images, seed: int) -> Images:
        _, height, width, channels = image_shape(images)
        field = smooth_field(height, width, channels, waves=self.waves, field_seed=self.field_seed)
        return to_uint8(images + self.eps * field)
