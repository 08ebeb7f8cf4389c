"""Whether a model knows the labels of the clean images, in their order: what could be judged of it otherwise?"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ...clean import CleanSet, Pixels
from ...runtime import Runtime
from .inputs import answers, count_outputs
from .protocol import frozen

__all__ = ["check_known", "frozen_pixels"]

CHANCE = 2.0  # standard errors above chance: what a model exceeds that knows the labels
MOST = 5000  # classes whose order is asked for: that takes their square in memory, seconds for so many
CLEARLY = 0.05  # more images named right in another order of classes; fewer may be what two classes have in common


def frozen_pixels(model: nn.Module, mean: Sequence[float], std: Sequence[float], runtime: Runtime) -> Pixels:
    """A copy of the model that takes pixels, frozen, on the runtime's device."""
    taking: Pixels = frozen(runtime.place(Pixels(copy.deepcopy(model), mean, std)))  # type: ignore[assignment]
    return taking


def check_known(
    model: nn.Module,
    clean: CleanSet,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    runtime: Runtime,
    classes: Sequence[str] | None = None,
) -> None:
    """Refuse a model that knows no more of labelled images than a guess does, or that knows them in another order of classes:
    its fall could not be judged, and a method that trains would teach it the wrong order.

    A guess is one that gives each class as often as the model does, but at random; so one class for all is a guess, however
    unbalanced the images are, and a model without fault is none.

    Args: classes: What the labels are called, for messages.

    Raises:
        ValueError: It does not; another order of classes, say, or another normalisation."""
    if clean.labels is None:
        return
    network = frozen_pixels(model, mean, std, runtime)
    count = max(count_outputs(network, clean.images[:2], runtime), int(clean.labels.max()) + 1)
    predicted = answers(network, clean, runtime).argmax(1)
    accuracy = int((predicted == clean.labels).sum()) / len(clean)
    given, true = (labels.bincount(minlength=count).double() / len(clean) for labels in (predicted, clean.labels))
    chance = float((given * true).sum())
    spread = chance + chance**2 - float((given * true * (given + true)).sum())  # of Cohen's kappa [Fleiss et al. 1969], >= 0
    if accuracy <= chance + CHANCE * (max(0.0, spread) / len(clean)) ** 0.5:
        raise ValueError(
            f"the model names {accuracy:.2f} of the {len(clean)} clean images rightly, as a guess might; check the order of"
            " classes, --mean, --std and --input-size, or repair it with --unlabeled"
        )
    better, label, output = _otherwise(predicted, clean.labels, count) if count <= MOST else (None, 0, 0)
    if better is not None:
        called = repr(classes[label]) if classes is not None else f"{label}"
        raise ValueError(
            f"the model names {accuracy:.2f} of the clean images rightly, and {better:.2f} in another order: class {called},"
            f" number {label} here, is its output {output}; name the folders so that they sort as it was trained (here '2' comes"
            " before '10', not so in torchvision), or repair it with --unlabeled"
        )


def _otherwise(predicted: Tensor, labels: Tensor, count: int) -> tuple[float | None, int, int]:
    """The share of images named right in the order of outputs that fits the labels best, and the first class that has another
    output there; None where that is not clearly more than in the given order. Each half of every class is named in the order
    that fits the other half, so that nothing is won by chance."""
    turn = torch.empty(len(labels), dtype=torch.int64)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        turn[rows] = torch.arange(len(rows)) % 2
    right = torch.zeros(len(labels), dtype=torch.bool)
    for half in (0, 1):
        order = _order(predicted[turn != half], labels[turn != half], count)
        right[turn == half] = predicted[turn == half] == torch.from_numpy(order)[labels[turn == half]]
    own = predicted == labels
    won, lost = int((right & ~own).sum()), int((own & ~right).sum())
    order = _order(predicted, labels, count)
    moved = [label for label in labels.unique().tolist() if order[label] != label]
    clearly = won - lost > max(CHANCE * (won + lost) ** 0.5, CLEARLY * len(labels))  # McNemar's test of the same images
    return (float(right.float().mean()), moved[0], int(order[moved[0]])) if clearly and moved else (None, 0, 0)


def _order(predicted: Tensor, labels: Tensor, count: int) -> NDArray[np.int64]:
    """(count,) the output of each class with which most images are named right; its own where that is as good."""
    met = np.zeros((count, count))
    np.add.at(met, (labels.numpy(), predicted.numpy()), 1.0)
    return np.asarray(linear_sum_assignment(met + 1e-3 * np.eye(count), maximize=True)[1], dtype=np.int64)
