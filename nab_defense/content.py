"""Labels by content: what a group of suspects shares is taken off its images before a network names them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import scipy.linalg
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import ranks
from .runtime import Runtime

__all__ = ["ALIKE", "Batches", "alike", "beyond_content", "label_by_content", "mean_images", "mixture", "weighted_images"]

Batches = Iterable[tuple[Tensor, Tensor]]
ROUNDS = 5
STANDS = 0.98  # share of labels that no longer change
MORE = 1.01  # of the least that was left beyond content
ALIKE = 0.6  # cosine; parts of classes that stand apart by themselves reach .5, those with one trigger .7 to .95
SUM_TO_ONE = 1e3  # weight of that condition
CLEAN_LABEL = 0.5  # of the rate at which the rest of the class is given its label


def weighted_images(batches: Batches, weights: NDArray[np.float64]) -> Tensor:
    """Weighted sums of images, in one pass; by every rank for itself, as the order in which they are added shows in the sums.

    Args:
        batches: (images (B, C, H, W), labels) of N images in order.
        weights: (G, N).

    Returns: (G, C, H, W) float32, on the CPU."""
    table, first, total = torch.from_numpy(weights), 0, torch.zeros(())
    for images, _ in batches:
        part = table[:, first : first + len(images)]
        first += len(images)
        if part.any():
            total = total + torch.einsum("gb,bchw->gchw", part, images.cpu().double())
    return total.float()


def beyond_content(
    batches: Batches, labels: NDArray[np.int64], groups: Sequence[NDArray[np.bool_]], *, together: bool = True
) -> Tensor:
    """What the images of a group have in common that no mixture of contents explains: an estimate of their trigger.

    It is their mean, less the mixture of the other images' class means that comes nearest to it. Poison drawn from all classes
    is compared with all of them, clean-label poison with the rest of its class, and a natural style keeps only what sets it off.

    Args:
        batches: (images (B, C, H, W), labels) of N images in order.
        labels: (N,) as given.
        groups: (N,) bool each, at least one image in each and one outside all of them; no image in two.
        together: No group's images are content; False: to each group those of the others are, each group of one class.

    Returns: (G, C, H, W) float32, on the CPU."""
    classes, own = int(labels.max()) + 1, [int(labels[group][0]) for group in groups]
    codes = labels.copy()  # what all content is made of: the rest of each class, and the groups
    for index, group in enumerate(groups):
        codes[group] = classes + index
    counts = np.bincount(codes, minlength=classes + len(groups))
    means = mean_images(batches, codes, counts)
    held = np.diag(counts.astype(np.float64))[:, :classes]  # images of each code in the content of each class
    if not together:
        held[np.arange(classes, len(counts)), own] = counts[classes:]
    shares, beyond = held / held.sum(0).clip(min=1), np.zeros((len(groups), len(counts)))
    # The triangular factor holds all lengths and angles; one for all groups, since it takes far longer than what follows.
    factor: NDArray[np.float64] = scipy.linalg.qr(means.flatten(1).double().numpy().T, mode="raw", overwrite_a=True)[1]
    content = factor @ shares
    for index, label in enumerate(own):
        mixed, table, rest = shares.copy(), content.copy(), held[:, label].copy()
        rest[classes + index] = 0
        mixed[:, label] = rest / max(1.0, rest.sum())
        table[:, label] = factor @ mixed[:, label]
        there = mixed.any(axis=0)
        beyond[index] = -mixed[:, there] @ mixture(table[:, there], factor[:, classes + index])
        beyond[index, classes + index] += 1
    return (torch.from_numpy(beyond) @ means.flatten(1).double()).float().view(len(groups), *means.shape[1:])


def mean_images(batches: Batches, codes: NDArray[np.int64], counts: NDArray[np.int64]) -> Tensor:
    """(M, C, H, W) float32: the mean image of each code of M; zeros where it has none."""
    sums, first = torch.zeros(0), 0
    for images, _ in batches:
        if not first:
            sums = torch.zeros(len(counts), *images.shape[1:])
        sums.index_add_(0, torch.from_numpy(codes[first : first + len(images)]), images.cpu().float())
        first += len(images)
    return sums.div_(torch.from_numpy(counts.clip(min=1)).view(-1, 1, 1, 1))


def mixture(content: NDArray[np.float64], group: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K,) weights of the mixture of (M, K) that comes nearest to (M,)."""
    anchor = SUM_TO_ONE * max(np.abs(content).max(), np.abs(group).max())  # the last row, far larger, makes them sum to one
    table = np.vstack([content, np.full(content.shape[1], anchor)])
    weights: NDArray[np.float64] = scipy.optimize.nnls(table, np.append(group, anchor))[0]
    return weights


def alike(patterns: Tensor) -> NDArray[np.bool_]:
    """Which groups share the same: each of them, compared with the sum of the others, points the same way.

    Args: patterns: (G, C, H, W), see beyond_content.

    Returns: (G,) bool; nobody where no two are alike."""
    units = torch.nn.functional.normalize(patterns.flatten(1), dim=1)
    left = list(range(len(units)))
    while left:
        rest = units[left].sum(0) - units[left]
        close = torch.nn.functional.cosine_similarity(units[left], rest, dim=1)
        if close.min() >= ALIKE:
            break
        left.pop(int(close.argmin()))  # the least alike, which also pulls the others' sum aside
    return np.isin(np.arange(len(units)), left)


def label_by_content(
    model: nn.Module,
    batches: Callable[[NDArray[np.bool_]], Batches],
    labels: NDArray[np.int64],
    suspect: NDArray[np.bool_],
    *,
    runtime: Runtime,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Label suspects with their trigger taken off, as far as it is the same in all of them.

    A network that never learned a trigger can still be misled by it: sinusoidal stripes make airplanes look like horses. So the
    suspects of one given label are compared with trusted images of the same content: their mean, less the means of the
    classes that were proposed for them, each as often as proposed, is what they share beyond content. It is taken off, the
    network proposes anew, and so on until the labels stand still; or more is left beyond content than before, since wrong
    proposals take content off, and those that follow are worse. Right ones hardly change by this.

    A group that goes to its given label at half the rate of the rest of its class, or more, is clean-label poison (or
    innocent): content and label agree, and the whole group keeps its label.

    Args:
        model: Knows the classes and not the triggers.
        batches: From a mask of the N samples to loaders over them: normalised images, in order, without augmentation.
        labels: (N,) as given.
        suspect: (N,) bool with S true.
        runtime: Where to compute.

    Returns:
        (S,) labels and (S,) the network's probability of them, in the suspects' order.
    """
    given, member = np.unique(labels[suspect], return_inverse=True)
    everything = np.ones(len(labels), dtype=bool)
    rest = ~suspect & np.isin(labels, given)
    others = _probabilities(model, batches(rest), runtime)
    obeyed, classes = others.argmax(1) == labels[rest], others.shape[1]
    recall = np.array([obeyed[labels[rest] == label].sum() / max(1, (labels[rest] == label).sum()) for label in given])
    sizes = np.bincount(labels[~suspect], minlength=classes).clip(min=1)
    labelled, sure, shared = np.full(len(member), -1), np.zeros((len(member), classes), np.float32), None
    going, least = np.ones(len(given), dtype=bool), np.full(len(given), np.inf)
    for _ in range(ROUNDS):
        chances = _probabilities(model, batches(suspect), runtime, shared, torch.from_numpy(member))
        proposed = chances.argmax(1)
        weights = np.zeros((len(given), len(labels)))
        for index in range(len(given)):
            own = member == index
            shares = np.bincount(proposed[own], minlength=classes) / own.sum()
            weights[index] = np.where(suspect, 0.0, -(shares / sizes)[labels])
            weights[index, np.flatnonzero(suspect)[own]] = 1 / own.sum()
        shared = weighted_images(batches(everything), weights)
        left = shared.flatten(1).norm(dim=1).numpy()
        if (same := alike(shared)).any():  # one trigger for several labels is known better from all of them
            counts = torch.from_numpy(np.bincount(member)[same]).float()
            shared[same] = torch.einsum("g,gchw->chw", counts / counts.sum(), shared[same])
        going &= left <= MORE * least
        taken, still, least = going[member], (labelled == proposed).mean(), np.minimum(least, left)
        labelled, sure = np.where(taken, proposed, labelled), np.where(taken[:, None], chances, sure)
        if not going.any() or still >= STANDS:
            break
    for index, label in enumerate(given):
        own = member == index
        if (labelled[own] == label).mean() > CLEAN_LABEL * recall[index] > 0:
            labelled[own] = label
    return labelled, sure[np.arange(len(labelled)), labelled]


@torch.inference_mode()
def _probabilities(
    model: nn.Module, batches: Batches, runtime: Runtime, shared: Tensor | None = None, member: Tensor | None = None
) -> NDArray[np.float32]:
    """(N, K) softmax of the images, less what image i shares with its group member[i]."""
    model.eval()
    found: list[Tensor] = []
    if shared is not None and member is not None:
        shared, member = (tensor.to(runtime.torch_device) for tensor in (shared, member))
    for first, images, _ in ranks.deal(batches):
        images = runtime.put(images)
        if shared is not None and member is not None:
            images = images - shared[member[first : first + len(images)]]
        with runtime.autocast():
            found.append(model(runtime.put(images)).float().softmax(1))
    chances: NDArray[np.float32] = torch.cat(ranks.in_order(found)).cpu().numpy()
    return chances
