"""Who of a class shows a pattern that sets them apart, whatever a network makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from .content import Batches, mean_images, mixture
from .mixture import split_in_two
from .principal import project
from .scan import Scan, room_for
from .select import MIN_SEEDS, MIN_SEPARATION, MIN_VALLEY
from .session import Session
from .variation import reduced

__all__ = ["Shown", "batched", "reduced_images", "showing"]

ROUNDS = 5  # of who shows what the group shares, and what those share
NEAR = 50  # other classes whose content a group may have; more would take long where there are a thousand
BATCH = 4096
DIRECTIONS = 5  # in which the images of a class differ; on digits the first of them tells a few that carry a trigger

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Shown:
    """Who of a class of M samples shows what some of them share.

    Args:
        group: (M,) bool, those who share it.
        likely: (M,) probability of showing it.
        separation, valley: Of those who do from the rest, see mixture.split_in_two.
    """

    group: Mask
    likely: NDArray[np.float64]
    separation: float
    valley: float

    @property
    def apart(self) -> bool:
        return self.separation > MIN_SEPARATION and self.valley > MIN_VALLEY


def reduced_images(session: Session) -> Tensor:
    """(N, C, H, W) float16 on the CPU, all images, at most 32 pixels a side; above 256 MB, 44,000 in color, in a file."""
    held, first = torch.empty(0), 0
    for images, _ in session.ordered(session.source):
        small = reduced(images).half().cpu()
        if not first:
            shape = len(session.source), *small.shape[1:]
            held = torch.from_numpy(room_for(shape[0], small[0].numel(), np.float16, "images")).view(shape)
        held[first : first + len(small)] = small
        first += len(small)
    return held


def batched(images: Tensor, labels: NDArray[np.int64]) -> Batches:
    """As loaders give them, (images, labels), to be gone through many times."""
    return list(zip(images.split(BATCH), torch.from_numpy(labels).split(BATCH), strict=True))


def showing(
    images: Tensor,
    scan: Scan,
    aside: Mask,
    labels: Iterable[int],
    *,
    directions: dict[int, Tensor] | None = None,
    least: int = MIN_SEEDS,
) -> Iterator[list[list[Shown]]]:
    """Of each class who shows a pattern that sets them apart.

    A class may fall in two by its styles, and poison that is labelled so may stand with one of them, or nowhere. So each half of
    the class along its top singular direction, whether it falls in two there or not, and each half of these, is asked who of the
    class shows what it shares beyond content, and what these share, a few times over: of a few that are poison all become so.

    Args:
        images: (N, C, H, W), small enough to be held.
        scan: What a network that was trained on all of it saw.
        aside: (N,) bool, samples that are accused, and left aside.
        labels: The classes.
        directions: In which the images of others vary (see variation.variation): only what a group shares beyond that counts.
        least: The fewest of a class that are followed; fewer than MIN_SEEDS are a small part of a quarter, so that the halves of
            these are asked, too.

    Returns: for each class in turn, of each part, round by round, where it led."""
    counts = np.bincount(scan.labels, minlength=scan.num_classes)
    means = mean_images(batched(images, scan.labels), scan.labels, counts).flatten(1)
    for label in labels:
        own = scan.labels == label
        flat, free = images[torch.from_numpy(own)].flatten(1).float(), ~aside[own]
        others = means[torch.from_numpy((counts > 0) & (np.arange(len(counts)) != label))]
        rows = None if directions is None else directions[label]
        starts = [start[own] for start in _starts(scan, own & ~aside, least)]
        if least < MIN_SEEDS and rows is not None:
            starts += _by_look(flat, free, rows, least)
        rounds = (_who_show(flat, free, start, others, rows, least) for start in starts)
        yield [list(one) for one in rounds]


def _starts(scan: Scan, members: Mask, least: int) -> list[Mask]:
    """The halves of a class, the halves of these, and so on; (N,) bool each, those that are large enough."""
    parts, found = [members], list[Mask]()
    for _ in range(2 if least >= MIN_SEEDS else 3):
        parts = [half for part in parts for half in _halves(scan, part, least)]
        found += parts
    return [part for part in found if part.sum() >= least]


def _halves(scan: Scan, members: Mask, least: int) -> list[Mask]:
    rows, upper = np.flatnonzero(members), np.zeros_like(members)
    if len(rows) < 2 * least:
        return []
    upper[rows] = split_in_two(project(scan.features, rows, 1)[:, 0])[0] > 0.5
    return [upper, members & ~upper] if 0 < upper.sum() < len(rows) else []  # equal features are not halved


def _by_look(flat: Tensor, free: Mask, rows: Tensor, least: int) -> list[Mask]:
    """The smaller parts of a class along the directions in which its images differ most beyond content; (M,) bool each.

    What a network makes of a few poisoned images may be what it makes of others of their class."""
    found, rest = list[Mask](), flat[torch.from_numpy(free)]
    rest = rest - (rest @ rows.T) @ rows
    heights, spreads, _ = randomized_svd((rest - rest.mean(0)).numpy(), min(DIRECTIONS, *rest.shape), random_state=0)
    for column in (heights * spreads).T:
        upper = np.zeros_like(free)
        upper[free] = split_in_two(column)[0] > 0.5
        found.append(min(upper, free & ~upper, key=lambda half: half.sum()))
    return [part for part in found if part.sum() >= least]


def _who_show(flat: Tensor, free: Mask, group: Mask, others: Tensor, rows: Tensor | None, least: int) -> Iterator[Shown]:
    """From a group to those who show what it shares, and on.

    Args:
        flat: (M, D), images of the class.
        free: (M,) bool, which are asked.
        group: (M,) bool, some of these.
        others: (K, D) mean images of the other classes.
        rows: (R, D) orthonormal, what does not count.
        least: As in showing."""
    total = flat.sum(0)
    for _ in range(ROUNDS):
        some, count = torch.from_numpy(group).float() @ flat, int(group.sum())
        mean, rest = some / count, (total - some) / (len(group) - count)
        near = others[(others - mean).norm(dim=1).topk(min(NEAR, len(others)), largest=False).indices]
        content = torch.vstack([rest, near]).T
        pattern = mean - content @ torch.from_numpy(mixture(content.double().numpy(), mean.double().numpy())).float()
        if rows is not None:
            pattern -= (pattern @ rows.T) @ rows
        shows = flat @ (pattern / pattern.square().sum().clamp_min(1e-12))
        much, likely = (shows - shows[torch.from_numpy(~group)].mean()).double().numpy(), np.zeros(len(group))
        likely[free], separation, valley = split_in_two(much[free], means=(0, 1))
        those = likely > 0.5
        if not least <= those.sum() <= free.sum() - MIN_SEEDS:
            return
        yield Shown(group, likely, separation, valley)
        if np.array_equal(those, group):
            return
        group = those
