"""The stamp: what the defender paints on an image, alike for uint8, [0, 1] float and normalised tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Patch", "Stamp"]

CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right")


@dataclass(frozen=True)
class Stamp:
    """A square in one corner of the image.

    The default is the reference stamp [NAB, arXiv:2307.15539; authors' code]: 2x2 pixels at 32 px, top left, zero
    AFTER normalisation, which is the data set's mean color and not black.

    Args:
        size: Edge in pixels; None scales with the image: max(2, round(H / 16)).
        corner: One of top_left, top_right, bottom_left, bottom_right.
        value: "mean" (zero after normalisation), a grey value in [0, 1], or "noise" (a pattern drawn from `seed`).
        seed: Seed of the "noise" pattern.
    """

    size: int | None = None
    corner: str = "top_left"
    value: float | str = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size is not None:
            self._set_whole("size", 1, "a whole number of pixels >= 1, or null")
        self._set_whole("seed", 0, "a whole number >= 0")
        if self.corner not in CORNERS:
            raise ValueError(f"stamp corner must be one of {', '.join(CORNERS)}, got {self.corner!r}")
        if isinstance(self.value, str):
            if self.value not in ("mean", "noise"):
                raise ValueError(f"stamp value must be 'mean', 'noise' or a number in [0, 1], got {self.value!r}")
        elif not 0 <= float(self.value) <= 1:
            raise ValueError(f"stamp value must be in [0, 1], got {self.value}")
        else:
            object.__setattr__(self, "value", float(self.value))

    def _set_whole(self, name: str, least: int, needed: str) -> None:
        """Make numpy's integers Python's, which a saved state can hold."""
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"stamp {name} must be {needed}, got {value!r}")
        object.__setattr__(self, name, int(value))

    @classmethod
    def random(cls, seed: int) -> Stamp:
        """A secret stamp: corner and pixel pattern follow from `seed`, which stays with the defender."""
        corner = CORNERS[int(np.random.default_rng(seed).integers(len(CORNERS)))]
        return cls(size=None, corner=corner, value="noise", seed=seed)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able settings; `Stamp(**settings)` gives the stamp back."""
        return asdict(self)

    def region(self, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns that the stamp covers on an image of this size.

        Raises:
            ValueError: The image is smaller than the stamp.
        """
        height, width = int(height), int(width)  # while a network is traced they are tensors
        edge = self.size or max(2, round(height / 16))
        if edge > min(height, width):
            raise ValueError(f"a {edge} px stamp does not fit on a {height}x{width} image")
        rows = slice(0, edge) if self.corner.startswith("top") else slice(height - edge, height)
        cols = slice(0, edge) if self.corner.endswith("left") else slice(width - edge, width)
        return rows, cols

    def patch(self, edge: int, mean: Sequence[float]) -> Tensor:
        """(C, edge, edge) float32 pixel values in [0, 1] for images with these channel means."""
        if self.value == "mean":
            return torch.tensor(list(mean)).view(-1, 1, 1).expand(-1, edge, edge).clone()
        if self.value == "noise":
            rng = np.random.default_rng([self.seed, edge])
            return torch.from_numpy(rng.random((len(mean), edge, edge), dtype=np.float32))
        return torch.full((len(mean), edge, edge), float(self.value))

    def __call__(
        self, image: Tensor, *, mean: Sequence[float], std: Sequence[float] | None = None, normalized: bool = False
    ) -> Tensor:
        """A stamped copy of an image or a batch.

        Args:
            image: (C, H, W) or (B, C, H, W): uint8 in [0, 255], float in [0, 1], or float normalised by mean and std.
            mean: Channel means in [0, 1], as the model's normalisation uses them.
            std: Channel deviations; needed with `normalized`.
            normalized: The float image was normalised; ignored for uint8.

        Returns:
            A new tensor of the same shape and dtype; the three forms agree to within one grey level.
        """
        return self.fitted(image, mean=mean, std=std, normalized=normalized).paint(image)

    def fitted(self, image: Tensor, *, mean: Sequence[float], std: Sequence[float] | None, normalized: bool) -> Patch:
        """The stamp in place and units of images like this one; see __call__. Making it takes longer than painting it."""
        if image.shape[-3] != len(mean):
            raise ValueError(f"image has {image.shape[-3]} channels, the normalisation {len(mean)}")
        rows, cols = self.region(image.shape[-2], image.shape[-1])
        patch = self.patch(rows.stop - rows.start, mean)
        if image.dtype == torch.uint8:
            patch = (patch * 255).round()
        elif normalized:
            if std is None:
                raise ValueError("a normalised image needs std to be stamped")
            patch = (patch - torch.tensor(list(mean)).view(-1, 1, 1)) / torch.tensor(list(std)).view(-1, 1, 1)
        return Patch(rows, cols, patch.to(image))


@dataclass(frozen=True, eq=False)
class Patch:
    """Pixel values (C, edge, edge) and where they go, for images of one size, type and device."""

    rows: slice
    cols: slice
    values: Tensor

    def paint(self, image: Tensor) -> Tensor:
        """A stamped copy of an image (C, H, W) or a batch (B, C, H, W)."""
        stamped = image.clone()
        stamped[..., self.rows, self.cols] = self.values
        return stamped

    def paint_traced(self, images: Tensor) -> Tensor:
        """As paint, in steps that torch.jit.trace follows for batches of any size: it would keep that of an assignment."""
        height, width = map(int, images.shape[-2:])
        around = self.cols.start, width - self.cols.stop, self.rows.start, height - self.rows.stop
        there = F.pad(torch.ones(self.values.shape[-2:], dtype=torch.bool, device=images.device), around)
        return torch.where(there, F.pad(self.values, around), images)

    def paint_some(self, images: Tensor, chosen: Tensor) -> None:
        """Stamp some images of a batch (B, C, H, W) in place.

        Args: chosen: (B, 1, 1, 1) bool. Not as an index: that would make a GPU wait to learn how many there are."""
        region = images[..., self.rows, self.cols]
        region.copy_(torch.where(chosen, self.values, region))
