"""A toy set that tiny networks learn at once: four bars."""

from __future__ import annotations

import torch
from torch import nn

from nab_defense.clean import CleanSet


def bars(count: int, *, seed: int = 0, light: int = 120) -> CleanSet:
    """Noisy images (count, 1, 8, 8) of four bars, one a class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = 60 * torch.rand(count, 1, 8, 8, generator=generator)
    for index, label in enumerate(labels.tolist()):
        images[index, 0, 2 * label : 2 * label + 2] += light
    return CleanSet(images.byte(), labels, pad=1, hflip=0.5)


def knows_bars(model: nn.Module, *, steps: int) -> nn.Module:
    """The model after so many steps on bars normalised by mean .5 and deviation .25."""
    clean, optimizer = bars(200), torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model((clean.images / 255 - 0.5) / 0.25), clean.labels).backward()
        optimizer.step()
    return model.eval()
