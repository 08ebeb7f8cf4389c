"""How images vary: what of a pattern that explains may be content, the rest is none."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["beyond_variation", "reduced", "variation"]

Batches = Iterable[tuple[Tensor, Tensor]]
EXPLAINED = 0.9  # of the variance of the images
SAMPLE = 1000  # images, the same number of each class, that the directions are known from
FEWEST = 100  # of other classes, below which nothing is known of how they vary
EDGE = 32  # pixels; what of larger images a thousand of them can tell is coarse


def reduced(images: Tensor) -> Tensor:
    """(B, C, H, W) as it is, or averaged to EDGE pixels a side; float32."""
    height, width = images.shape[2:]
    if max(height, width) <= EDGE:
        return images.float()
    return F.adaptive_avg_pool2d(images.float(), (min(height, EDGE), min(width, EDGE)))


def variation(batches: Batches, labels: NDArray[np.int64], aside: NDArray[np.bool_]) -> dict[int, Tensor]:
    """The directions in which the images of the other classes vary most, which hold EXPLAINED of their variance.

    A style of a class differs from the rest of it by content, and content varies in these directions. A trigger that no image
    shows by nature does not lie in them, but for a smooth one, and one that many images of other classes show.

    Args:
        batches: (images (B, C, H, W), labels) of N images in order; gone through once.
        labels: (N,) as given.
        aside: (N,) bool, samples that are accused, and not looked at.

    Returns: label -> (R, D) float32, orthonormal rows for reduced images, on the CPU; without labels of which there are too few
        others."""
    places, taken, first = _chosen(labels, aside), list[Tensor](), 0
    for images, _ in batches:
        inside = places[(places >= first) & (places < first + len(images))] - first
        taken.append(reduced(images[torch.from_numpy(inside).to(images.device)].cpu()).flatten(1))
        first += len(images)
    sample, own = torch.cat(taken).double(), labels[places]
    known = [label for label in np.unique(labels).tolist() if (own != label).sum() >= FEWEST]
    return {label: _directions(sample[torch.from_numpy(own != label)]) for label in known}


def _chosen(labels: NDArray[np.int64], aside: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Rows, rising and always the same ones: of each class as many, or all that it has."""
    order = np.random.default_rng(0).permutation(np.flatnonzero(~aside))
    each = -(-SAMPLE // len(np.unique(labels)))
    return np.sort(np.concatenate([order[labels[order] == label][:each] for label in np.unique(labels)]))


def _directions(images: Tensor) -> Tensor:
    """(R, D), of (M, D)."""
    varied = images - images.mean(0)
    variances, mixed = torch.linalg.eigh(varied @ varied.T)  # rising; of few images far quicker than a decomposition of these
    held = variances.flip(0).clamp_min(0).cumsum(0).clamp_min(1e-12)
    count = int((held / held[-1] < EXPLAINED).sum()) + 1
    return F.normalize(mixed.flip(1)[:, :count].T @ varied, dim=1).float()


def beyond_variation(patterns: Tensor, labels: list[int], directions: dict[int, Tensor]) -> Tensor:
    """Patterns (G, C, H, W) of classes, less what lies in the directions of their classes; nothing is left where these are not
    known. (G, C, H, W) float32."""
    rest = []
    for pattern, label in zip(patterns, labels, strict=True):
        if label not in directions:
            rest.append(torch.zeros_like(pattern))
            continue
        small, rows = reduced(pattern[None]), directions[label]
        content = ((small.flatten(1) @ rows.T) @ rows).view(small.shape)
        if content.shape[2:] != pattern.shape[1:]:
            content = F.interpolate(content, size=pattern.shape[1:], mode="bilinear", align_corners=False)
        rest.append(pattern - content[0])
    return torch.stack(rest)
