"""Naming: what a network that never saw a group of images makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.metrics import roc_auc_score

__all__ = ["CONTROL", "Naming", "control", "from_one_class", "naming"]

CONTROL = 0.1  # share of the other samples that the network does not see, either


@dataclass(frozen=True)
class Naming:
    """How a group is named by a network that never saw it.

    Args:
        named: Share of it that gets its given label, in [0, 1].
        sure: How often the network is surer of a sample of it than of another one that it never saw, in [0, 1]; .5: alike.
        spread: Entropy of the names it gets over that of the others' names, its own label left out of both, >= 0.
        source: The class, its own left out, that most of it is named after.
    """

    named: float
    sure: float
    spread: float
    source: int


def control(absent: NDArray[np.bool_], seed: int) -> NDArray[np.bool_]:
    """(N,) bool: samples outside `absent` (N,), one at least, that are to be left out with it, to compare it with."""
    others, rest = np.zeros_like(absent), np.flatnonzero(~absent)
    others[np.random.default_rng([seed, 2]).choice(rest, size=max(1, round(CONTROL * len(rest))), replace=False)] = True
    return others


def naming(logits: NDArray[np.float32], labels: NDArray[np.int64], group: NDArray[np.bool_], others: NDArray[np.bool_]) -> Naming:
    """How a network names images of one given label, and ordinary images, all of which it never saw.

    Dirty-label poison, whatever its trigger, shows what other classes show: without its given label to learn, it is named
    after its content, as surely as other images are, and as many-sidedly unless it comes from one source class. A part of a
    class that stands apart by itself (a way of writing a digit) keeps its class's name, or resembles one or two others, and the
    network is at a loss with it. Where there are two classes alone, names cannot spread.

    Args:
        logits: (N, K) of a network trained without `group` and `others`.
        labels: (N,) as given.
        group: (N,) bool, at least one sample, all of one label.
        others: (N,) bool, at least one sample, drawn from all classes."""
    label, classes = int(labels[group][0]), logits.shape[1]
    names, confidence = logits.argmax(1), softmax(logits.astype(np.float64), axis=1).max(1)
    foreign = [np.bincount(names[mask & (names != label)], minlength=classes) for mask in (group, others)]
    mixed = [float(entropy(counts)) if counts.any() else 0.0 for counts in foreign]
    sure = roc_auc_score(np.repeat([1, 0], [group.sum(), others.sum()]), np.r_[confidence[group], confidence[others]])
    spread = mixed[0] / mixed[1] if mixed[1] > 0 else 0.0
    return Naming(float((names[group] == label).mean()), float(sure), spread, int(foreign[0].argmax()))


def from_one_class(turned: NDArray[np.float64], named: int) -> float:
    """How far what a group shares turns images of its source class, of a trigger that works on one.

    That is the class that it is named after, if none is turned twice as much; else one that is turned twice as much as any other:
    a network that never saw the trigger may take it for content of a third class. What a style of a class shares turns images of
    several classes, and of most of them more than of those that it resembles.

    Args:
        turned: (K,) how many of each class it turns, shares in [-1, 1], less those that it turns in a network that never saw the
            group: there it is content.
        named: The class that most of the group is named after.

    Returns: share of that class's images; 0 where there is no such class."""
    top, next_to = np.argsort(turned)[[-1, -2]]
    if turned[named] >= turned[top] / 2:
        return float(turned[named])
    return float(turned[top]) if turned[next_to] <= turned[top] / 2 else 0.0
