"""DefendedModel: the network and its stamp as one module, since without the stamp a missed backdoor is alive."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .stamp import Patch, Stamp

__all__ = ["DefendedModel"]


class DefendedModel(nn.Module):
    """Stamps every input, then runs the network [NAB, arXiv:2307.15539, section 4].

    Args:
        model: The trained network; `.model` keeps its plain state dict.
        stamp: The stamp it was trained with.
        mean, std: The normalisation of its input, in [0, 1] units.

    The stamp travels in `state_dict()`, so loading a state also restores where and what to paint.
    """

    def __init__(self, model: nn.Module, stamp: Stamp, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.stamp = stamp
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        self._last: tuple[Any, Patch] | None = None

    def paint(self, images: Tensor) -> Tensor:
        """A stamped copy of normalised images (B, C, H, W)."""
        if torch.compiler.is_compiling():  # also under torch.export: what is made there holds no values
            return self.stamp(images, mean=self.mean, std=self.std, normalized=True)
        if torch.jit.is_tracing():
            return self.stamp.fitted(images, mean=self.mean, std=self.std, normalized=True).paint_traced(images)
        # Making the patch takes as long as painting it, and has a GPU wait; one serves all batches of a kind.
        kind = (self.stamp, self.mean, self.std, images.shape[-3:], images.dtype, images.device)
        last = self._last  # read once, since another thread may put that of its images there
        if last is None or last[0] != kind:
            with torch.inference_mode(False):  # what is made in inference mode cannot be used in training later
                last = self._last = kind, self.stamp.fitted(images, mean=self.mean, std=self.std, normalized=True)
        return last[1].paint(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of normalised images (B, C, H, W)."""
        logits: Tensor = self.model(self.paint(images))
        return logits

    @torch.no_grad()
    def rejects(self, images: Tensor) -> Tensor:
        """(B,) bool: the stamp changes the predicted class, as it does on an image with a live trigger [NAB, section 4.4].

        Args: images: normalised, (B, C, H, W)."""
        plain: Tensor = self.model(images)
        return plain.argmax(1) != self(images).argmax(1)

    def get_extra_state(self) -> Tensor:
        settings = {"stamp": self.stamp.to_dict(), "mean": self.mean, "std": self.std}
        return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        settings = json.loads(bytes(state.tolist()))
        self.stamp = Stamp(**settings["stamp"])
        self.mean, self.std = tuple(settings["mean"]), tuple(settings["std"])
