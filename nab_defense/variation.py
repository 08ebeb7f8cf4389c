"""How images vary: what of a pattern that explains may be content, the rest is none."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["beyond_variation", "variation"]

Batches = Iterable[tuple[Tensor, Tensor]]
EXPLAINED = 0.9  # of the variance of the images
SAMPLE, BYTES = 1000, 2**28  # images, and bytes of them, at most, that the directions are known from


def variation(batches: Batches, labels: NDArray[np.int64]) -> dict[int, Tensor]:
    """The directions in which the images of the other classes vary most, which hold EXPLAINED of their variance.

    A style of a class differs from the rest of it by content, and content varies in these directions. A trigger that no image
    shows by nature does not lie in them, but for a smooth one.

    Args:
        batches: (images (B, C, H, W), labels) of N images in order; gone through once.
        labels: (N,) as given, of two classes at least.

    Returns: label -> (R, C * H * W) float64, orthonormal rows, on the CPU."""
    rows, taken = np.random.default_rng(0).permutation(len(labels)), list[Tensor]()
    first, places = 0, np.zeros(0, np.int64)
    for images, _ in batches:
        if not first:
            count = max(2, min(SAMPLE, BYTES // (8 * images[0].numel())))
            places = np.sort(rows[:count])
        inside = places[(places >= first) & (places < first + len(images))] - first
        taken.append(images[torch.from_numpy(inside).to(images.device)].cpu().flatten(1).double())
        first += len(images)
    sample, own = torch.cat(taken), labels[places]
    return {label: _directions(sample[torch.from_numpy(own != label)]) for label in np.unique(labels).tolist()}


def _directions(images: Tensor) -> Tensor:
    """(R, D), of (M, D)."""
    varied = images - images.mean(0)
    variances, mixed = torch.linalg.eigh(varied @ varied.T)  # rising; of few images far quicker than a decomposition of these
    held = variances.flip(0).clamp_min(0).cumsum(0).clamp_min(1e-12)
    count = int((held / held[-1] < EXPLAINED).sum()) + 1
    return torch.nn.functional.normalize(mixed.flip(1)[:, :count].T @ varied, dim=1)


def beyond_variation(patterns: Tensor, labels: list[int], directions: dict[int, Tensor]) -> Tensor:
    """Patterns (G, C, H, W) of classes, less what lies in the directions of their classes; (G, C, H, W) float32."""
    flat = patterns.flatten(1).double()
    rest = [row - (row @ directions[label].T) @ directions[label] for row, label in zip(flat, labels, strict=True)]
    return torch.stack(rest).float().view(patterns.shape)
