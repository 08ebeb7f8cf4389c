"""What a network that never saw a group of images makes of them, and who else shows what they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.metrics import roc_auc_score
from torch import Tensor

from .content import Batches, beyond_content
from .mixture import split_in_two
from .select import MAX_NAMED, MIN_SEEDS, MIN_SEPARATION, MIN_VALLEY
from .variation import beyond_variation

__all__ = ["CONTROL", "MANY", "Naming", "all_bearers", "amounts", "bearers", "carried", "control", "naming", "second_choices"]

CONTROL = 0.1  # share of the other samples that the network does not see, either
BLOCK = 65536  # samples whose logits are copied at once
SHOWN = 0.5  # of a pattern: more of it than not
COVERS = 5  # images of other classes that show it, at least
MANY = 10  # classes; of fewer a clean image has a second choice that is sure, and they are soon as various as content


@dataclass(frozen=True)
class Naming:
    """How a group is named by a network that never saw it.

    Args:
        named: Share of it that gets its given label, in [0, 1].
        sure: How often the network, its given label left out, is surer of a sample of it than of another one that it never saw,
            in [0, 1]; .5: alike.
        spread: Entropy of the names it gets then over that of the others' names, >= 0.
    """

    named: float
    sure: float
    spread: float


def control(absent: NDArray[np.bool_], seed: int) -> NDArray[np.bool_]:
    """(N,) bool: samples outside `absent` (N,), one at least, that are to be left out with it, to compare it with."""
    others, rest = np.zeros_like(absent), np.flatnonzero(~absent)
    others[np.random.default_rng([seed, 2]).choice(rest, size=max(1, round(CONTROL * len(rest))), replace=False)] = True
    return others


def naming(
    logits: NDArray[np.float32],
    labels: NDArray[np.int64],
    group: NDArray[np.bool_],
    others: NDArray[np.bool_],
    *,
    outside: Sequence[int] = (),
    unbiased: bool = False,
) -> Naming:
    """How a network names images of one given label, and ordinary images, all of which it never saw.

    Dirty-label poison, whatever its trigger, shows what other classes show: without its given label to learn, it is named
    after its content, as surely as other images are, and as many-sidedly unless it comes from one source class. A part of a
    class that stands apart by itself (a way of writing a digit) keeps its class's name, or resembles one or two others, and the
    network is at a loss with it. Some poison that was not left out teaches its trigger, and the group may get its given label for
    that; so this one is left out of the choice: what comes second is content still, where a style has nothing to come second.
    Of fewer than ten classes that tells nothing: there a group that gets its given label is neither sure nor spread. Where there
    are two classes alone, names cannot spread.

    Args:
        logits: (N, K) of a network trained without `group` and `others`.
        labels: (N,) as given.
        group: (N,) bool, at least one sample, all of one label.
        others: (N,) bool, at least one sample, drawn from all classes.
        outside: Labels that the network never saw, and has no name for.
        unbiased: Take off what entropies of few samples lack [Miller 1955]."""
    label = int(labels[group][0])
    masks = group, others & ~np.isin(labels, [label, *outside])
    named = float((logits[group].argmax(1) == label).mean())
    if not masks[1].any() or (logits.shape[1] < MANY and named >= MAX_NAMED):
        return Naming(named, 0.0, 0.0)
    rest = [np.delete(logits[mask], [*{label, *outside}], axis=1).astype(np.float64) for mask in masks]
    sure = _higher(*(softmax(table, axis=1).max(1) for table in rest))
    counts = [np.bincount(table.argmax(1)) for table in rest]
    mixed = [float(entropy(names) + unbiased * (np.count_nonzero(names) - 1) / (2 * names.sum())) for names in counts]
    return Naming(named, sure, mixed[0] / mixed[1] if mixed[1] > 0 else 0.0)


def second_choices(
    logits: NDArray[np.float32], labels: NDArray[np.int64], groups: Sequence[NDArray[np.bool_]], aside: NDArray[np.bool_]
) -> list[tuple[float, float]]:
    """How likely parts of a class are poison by what a network that was trained on them names them second.

    What a poisoned image shows comes second to its trigger, and poison shows many things; what a clean image resembles besides
    its class is less clear, or the same for all.

    Args:
        logits: (N, K).
        labels: (N,) as given.
        groups: (N,) bool each, at least one sample, of one class.
        aside: (N,) bool, samples that are left aside; of the other classes some are not.

    Returns: for each group how often the network is surer of its second choice than of one of the other classes', and the
        entropy of its second choices over that of an even choice, both in [0, 1]; the latter 0 of two
        classes alone."""
    if not groups:
        return []
    choices, chances, names, found = logits.shape[1] - 1, np.zeros(len(labels)), np.zeros(len(labels), dtype=np.int64), []
    for start in range(0, len(labels), BLOCK):
        block = slice(start, start + BLOCK)
        rest = logits[block].astype(np.float64)
        rest[np.arange(len(rest)), labels[block]] = -np.inf
        chances[block], names[block] = softmax(rest, axis=1).max(1), rest.argmax(1)
    for group in groups:
        others = (labels != labels[group][0]) & ~aside
        spread = float(entropy(np.bincount(names[group])) / np.log(choices)) if choices > 1 else 0.0
        found.append((_higher(chances[group], chances[others]), spread))
    return found


def _higher(some: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """How often one of the former, at least one, is higher than one of the latter, at least one; in [0, 1]."""
    return float(roc_auc_score(np.repeat([1, 0], [len(some), len(others)]), np.concatenate([some, others])))


def carried(batches: Batches, labels: NDArray[np.int64], groups: Sequence[NDArray[np.bool_]], patterns: Tensor) -> list[float]:
    """How clearly images of other classes fall into some that show what a group shares, and the rest.

    A trigger that works on one class alone had to be taught so, by covers: images of others that carry it and keep their labels
    [TaCT, Tang et al. 2021]. What a style shares is spread over all images by degrees.

    Args:
        batches: (images (B, C, H, W), labels) of N images in order; gone through three times, however many groups there are.
        labels: (N,) as given.
        groups: (N,) bool each, of one class and not all of it; no image in two.
        patterns: (G, C, H, W), what they share, see content.beyond_content.

    Returns: for each depth of the valley between the two in how much they show of it, see select.split_in_two, in [0, 1]; 0 where
        they do not separate, or those that show more show less than half, or are fewer than COVERS."""
    every = list(amounts(batches, labels, groups, patterns))
    # Without those of its class that came with it.
    sure = {place: mask for place, group in enumerate(groups) if (mask := group & (every[place] > SHOWN)).any()}
    if sure:
        purer = beyond_content(batches, labels, [*sure.values()], together=False)
        for place, shown in zip(sure, amounts(batches, labels, [*sure.values()], purer), strict=True):
            every[place] = shown
    depths = []
    for group, shown in zip(groups, every, strict=True):
        others = shown[labels != labels[group][0]]
        likely, separation, valley = split_in_two(others, means=(0, 1))
        upper = others[likely > 0.5]
        depths.append(valley if separation > MIN_SEPARATION and len(upper) >= COVERS and upper.mean() >= SHOWN else 0.0)
    return depths


def bearers(
    batches: Batches,
    labels: NDArray[np.int64],
    groups: Sequence[NDArray[np.bool_]],
    *,
    directions: dict[int, Tensor] | None = None,
) -> list[NDArray[np.float64]]:
    """Who of its class shows what a group shares; for a trigger beyond doubt, of whose poison a few were not in the group.

    Args:
        batches: (images (B, C, H, W), labels) of N images in order; gone through twice, however many groups there are.
        labels: (N,) as given.
        groups: (N,) bool each, of one class and not all of it, no two of the same.
        directions: As in imprint.imprints.

    Returns: for each group (N,) the probability of each sample of its class to show it, 0 for others; for all, where these do not
        fall in two."""
    if not groups:
        return []
    found, patterns = [], beyond_content(batches, labels, groups, together=False)
    if directions is not None:
        patterns = beyond_variation(patterns, [int(labels[group][0]) for group in groups], directions)
    for group, shown in zip(groups, amounts(batches, labels, groups, patterns), strict=True):
        everyone, own = np.zeros(len(labels)), labels == labels[group][0]
        everyone[own] = _upper(shown[own])
        found.append(everyone)
    return found


def all_bearers(batches: Batches, labels: NDArray[np.int64], group: NDArray[np.bool_], patterns: Tensor) -> NDArray[np.float64]:
    """Who of any class shows a trigger that parts of several classes share: the few that did not stand apart teach it, too.

    Args:
        batches: (images (B, C, H, W), labels) of N images in order; gone through once.
        labels: (N,) as given.
        group: (N,) bool, those parts; no class belongs to it whole.
        patterns: (G, C, H, W), what each of them shares.

    Returns: (N,) probability of each sample to show it, 0 in classes that do not fall in two by that or of which half do."""
    everyone = np.zeros(len(labels))
    (shown,) = amounts(batches, labels, [group], patterns.mean(0, keepdim=True))
    for label in np.flatnonzero(np.bincount(labels) >= 2 * MIN_SEEDS):
        own = labels == label
        likely = _upper(shown[own])
        upper = shown[own][likely > 0.5]
        if 0 < len(upper) < own.sum() / 2 and upper.mean() >= SHOWN:
            everyone[own] = likely
    return everyone


def _upper(shown: NDArray[np.float64]) -> NDArray[np.float64]:
    """(M,) probability of each sample of a class to be of those that show it; 0 for all, where these do not stand apart."""
    likely, separation, valley = split_in_two(shown, means=(0, 1))
    return likely if separation > MIN_SEPARATION and valley > MIN_VALLEY else np.zeros(len(shown))


def amounts(
    batches: Batches, labels: NDArray[np.int64], groups: Sequence[NDArray[np.bool_]], patterns: Tensor
) -> Iterator[NDArray[np.float64]]:
    """For each group (N,) how much of what it shares an image shows, more than the rest of its class does; 1: all of it."""
    units = [pattern.flatten() / pattern.square().sum().clamp_min(1e-12) for pattern in patterns]
    flat = (images.cpu().float().flatten(1) for images, _ in batches)
    every = torch.cat([torch.stack([rows @ unit for unit in units]) for rows in flat], dim=1).double().numpy()
    for group, shown in zip(groups, every, strict=True):
        sums, counts = (np.bincount(labels[~group], weights, labels.max() + 1) for weights in (shown[~group], None))
        yield np.asarray(shown - (sums / counts.clip(min=1))[labels])
