"""Parts of classes in a trained network's features: what may be poison that shares no trigger which can be added to others."""

from __future__ import annotations

import dataclasses
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.mixture import GaussianMixture

from .mixture import ONE_THREAD, split_in_two
from .principal import Rows, Standardized, along, directions
from .scan import Scan
from .select import MIN_SEEDS, MIN_SEPARATION, MIN_VALLEY, Group, grow, probe

__all__ = [
    "DOUBT",
    "MAYBE",
    "Part",
    "distinct",
    "joined",
    "other_half",
    "same_parts",
    "smaller_halves",
    "with_more_like_it",
]

SOME_VALLEY = 0.1  # enough of one to look closer
DOUBT = 0.02  # left out is what belongs to the part with this probability: the rest of the poison would teach its trigger
MAYBE = 0.4  # most that a sample is said to belong to a part that it was not found with: left out with it, not examined
DIRECTIONS = 4  # of a class's features, in which it may fall in two
NORMALS = 2, 4  # of which its values there are taken to be a mixture: poison, and one style or a few
HARD = 0.02  # of ordinary samples, the hardest ones: what is harder is more of an accused part
SAME = 0.9  # overlap of two parts of a class, intersection over union, of which one is enough
FEW = 5  # of a class, where other classes have such a part, too

Split = tuple[NDArray[np.float64], float, float]  # see select.split_in_two
Part = tuple[Group, NDArray[np.float64]]  # of a class, and each sample's probability of being in it


def smaller_halves(scan: Scan, aside: NDArray[np.bool_]) -> list[Part]:
    """Classes that fall in two in a trained network's features, for whatever reason and however faintly.

    They are looked at along their top singular direction [Tran et al. 2018]. Few among many, as one poisoned image in a hundred,
    lie on the slope of the others along any one direction: where no class falls in two there, the parts of each in its first two
    directions, three or four, are what a probe on all features starts from, as `select.grow` does from seeds. Of small classes
    nearly all have two parts in a plane: a network that sees none of these names nothing well any more.

    Args:
        scan: What a trained network saw.
        aside: (N,) bool, samples that are left aside.

    Returns: of each such class a group, its smaller part, and for each sample of it (N,) the probability of being in that."""
    classes = [(label, (scan.labels == label) & ~aside) for label in range(scan.num_classes)]
    classes = [(label, members) for label, members in classes if members.sum() >= 2 * MIN_SEEDS]
    axes = [directions(scan.features, np.flatnonzero(members), DIRECTIONS) for _, members in classes]  # the costly part, once

    def values(rank: int) -> list[NDArray[np.float32]]:
        pairs = zip(classes, axes, strict=True)
        return [along(scan.features, np.flatnonzero(members), mean, top[:, :rank]) for (_, members), (mean, top) in pairs]

    found = _smaller(classes, [split_in_two(line[:, 0]) for line in values(1)])
    if found:
        return found
    features = Standardized(scan.features)
    for rank, count in product(range(2, DIRECTIONS + 1), NORMALS):
        pairs = zip(classes, values(rank), strict=True)
        found = _smaller(classes, [_furthest(scan, features, members, plane, count) for (_, members), plane in pairs])
        if found:
            return found
    return []


def _smaller(classes: list[tuple[int, NDArray[np.bool_]]], splits: list[Split]) -> list[Part]:
    """Of the classes that their splits show to fall in two the smaller part."""
    found = []
    for (label, members), (likely, separation, valley) in zip(classes, splits, strict=True):
        likely = likely if (likely > 0.5).mean() <= 0.5 else 1 - likely
        if _apart(separation, valley) and (likely > 0.5).sum() >= FEW:
            found.append(_part(label, members, likely, separation, valley))
    return found


def _furthest(scan: Scan, features: Rows, members: NDArray[np.bool_], values: NDArray[np.float32], count: int) -> Split:
    """What stands furthest apart of that which so many normals, fitted to a class's M members' values (M, rank), lead to."""
    starts = [part for part in _mixed(values, count) if MIN_SEEDS <= part.sum() <= len(part) / 2]
    splits = [_grown(scan, features, members, start) for start in starts]
    return max(splits, key=lambda split: (_apart(*split[1:]), split[2]), default=(np.zeros(len(values)), 0.0, 0.0))


@ONE_THREAD
def _mixed(values: NDArray[np.float32], count: int) -> list[NDArray[np.bool_]]:
    """(M, rank): which of the rows belong to each of so many normals; (M,) each."""
    values = values / np.maximum(values.std(0), 1e-12)
    # Ten starts: from a single one, by k-means, the mixture often halves the many and overlooks the few.
    mixture = GaussianMixture(count, random_state=0, reg_covar=1e-3, n_init=10, init_params="k-means++").fit(values)
    told = mixture.predict(values)
    return [told == one for one in range(count)]


def _grown(scan: Scan, features: Rows, members: NDArray[np.bool_], few: NDArray[np.bool_]) -> Split:
    """Some of a class's M members, (M,) bool, and what a probe takes for more of them: as split_in_two."""
    start = np.zeros_like(members)
    start[members] = few
    group, likely = grow(features, members, start, scan.losses, np.zeros_like(members), few=True)
    return likely, group.separation, group.valley


def _apart(separation: float, valley: float) -> bool:
    return separation > MIN_SEPARATION and valley > SOME_VALLEY


def _part(label: int, members: NDArray[np.bool_], likely: NDArray[np.float64], separation: float, valley: float) -> Part:
    """The group of a class's likely members, and the probability of each of all samples to be in it."""
    everyone = np.zeros(len(members))
    everyone[members] = likely
    return Group(label, 0, separation, valley, int((likely > 0.5).sum()), 0.0), everyone


@ONE_THREAD
def same_parts(scan: Scan, aside: NDArray[np.bool_], some: NDArray[np.bool_]) -> list[Part]:
    """Of each class that `some` are not of, the part that a probe which tells them from the rest of their own classes tells, too.

    Args:
        scan: What a trained network saw.
        aside: (N,) bool, samples that are left aside.
        some: (N,) bool, none of them aside.

    Returns: as smaller_halves."""
    features, own = Standardized(scan.features), np.isin(scan.labels, scan.labels[some]) & ~aside
    teller, found = probe().fit(features[np.flatnonzero(own)], some[own]), []
    theirs = float(teller.decision_function(features[np.flatnonzero(some)]).mean())
    for label in np.unique(scan.labels[~own & ~aside]).tolist():
        members = (scan.labels == label) & ~aside
        if members.sum() < 2 * MIN_SEEDS:
            continue
        told = teller.decision_function(features[np.flatnonzero(members)])
        likely, separation, valley = split_in_two(told, (float(told.mean()), theirs))
        if separation > MIN_SEPARATION and valley > MIN_VALLEY and FEW <= (likely > 0.5).sum() <= members.sum() / 2:
            found.append(_part(label, members, likely, separation, valley))
    return found


def other_half(members: NDArray[np.bool_], part: Part) -> Part:
    """Those of a class, (N,) bool, that are not in a part of it."""
    group, likely = part
    return dataclasses.replace(group, size=int(members.sum()) - group.size, alike=0.0), np.where(members, 1 - likely, 0)


def distinct(parts: list[Part]) -> list[Part]:
    """Without those that are nearly the same as one before them."""
    kept: list[Part] = []
    for part in parts:
        pairs = [(part[1] > 0.5, other > 0.5) for _, other in kept]
        if all((one & two).sum() < SAME * (one | two).sum() for one, two in pairs):
            kept.append(part)
    return kept


def with_more_like_it(scan: Scan, members: NDArray[np.bool_], part: NDArray[np.bool_]) -> NDArray[np.float64]:
    """A part that an earlier look found, and what is like it in a trained network: poison that it missed would teach its trigger.

    Args:
        scan: What the trained network saw.
        members: (N,) bool, the class.
        part: (N,) bool, some of it.

    Returns: (N,) probability of belonging to the part: 1 in it, at most MAYBE for others; 0 where it does not stand apart, and
    where too little of the class would be left to learn it from."""
    likely = part.astype(np.float64)
    if min(part.sum(), (members & ~part).sum()) < MIN_SEEDS:
        return likely
    group, grown = grow(Standardized(scan.features), members, part, scan.losses, np.zeros_like(part))
    wider = likely.copy()
    wider[members] = np.maximum(likely[members], np.minimum(grown, MAYBE))
    return wider if _apart(group.separation, group.valley) and (wider[members] <= DOUBT).sum() >= MIN_SEEDS else likely


def joined(
    scan: Scan,
    members: NDArray[np.bool_],
    likely: NDArray[np.float64],
    logits: NDArray[np.float32],
    ordinary: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """A part of a class that is accused, and more of it that was not.

    The other network, which never saw the part, goes by content. What it finds harder to name as labelled than nearly all of the
    ordinary samples that it was trained on, too, joins. So does what it names otherwise, and a probe on what both networks see
    takes for more of the part: the trained one knows the trigger, where an image shows enough of it.

    Args:
        scan: What the trained network saw.
        members: (N,) bool, the class.
        likely: (N,) probability of each sample to be in the part.
        logits: (N, K) of the other network.
        ordinary: (N,) bool, samples of other classes that it was trained on.

    Returns: (N,) as `likely`, raised where samples join."""
    part, other, chances = likely > 0.5, logits.argmax(1) != scan.labels, softmax(logits, axis=1)
    both, raised = Standardized(scan.features, chances), likely.copy()
    _, grown = grow(both, members, part, scan.losses, np.zeros_like(part))
    joining = members & other
    raised[joining] = np.maximum(likely[joining], grown[joining[members]])
    own = chances[np.arange(len(part)), scan.labels]
    if ordinary.any():
        hard = members & (own < np.quantile(own[ordinary], HARD))
        raised[hard] = np.maximum(raised[hard], 1 - HARD)
    return raised
