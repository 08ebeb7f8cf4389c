"""Scan: what one ordered pass of a network over a source sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .runtime import Runtime

__all__ = ["EarlyScan", "Scan", "features_and_logits", "scan_model"]

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Scan:
    """Labels and what a network made of every sample, in the source's order.

    Args:
        labels: (N,) int64, as they came with the data.
        losses: (N,) float32, cross-entropy of the given label, >= 0.
        logits: (N, K) float32.
        features: (N, D) float32, the pooled input of the classifier.
        fingerprint: Fingerprint of the source.
        epoch: Which epoch losses, logits and features were read after, from 1; 0: a finished network.
    """

    labels: NDArray[np.int64]
    losses: NDArray[np.float32]
    logits: NDArray[np.float32]
    features: NDArray[np.float32]
    fingerprint: str = ""
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return int(self.logits.shape[1])


def features_and_logits(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features (B, D) and logits (B, K) of any timm network, without naming a layer."""
    stream = model.forward_features(images)  # type: ignore[operator]
    return model.forward_head(stream, pre_logits=True), model.forward_head(stream)  # type: ignore[operator]


@torch.inference_mode()
def scan_model(model: nn.Module, loader: Batches, labels: NDArray[np.int64], *, runtime: Runtime, fingerprint: str = "") -> Scan:
    """One pass of a network, in eval mode, over a loader that goes through a source in order.

    Args:
        model: A timm network.
        loader: Batches of (images, labels), not shuffled, without augmentation, last batch included.
        labels: (N,) labels of the source; the loader must agree with them.
        runtime: Device and precision.
        fingerprint: Fingerprint of the source.

    Raises:
        ValueError: The loader's labels differ from the source's: shuffled, shortened, or a sample was replaced.
    """
    training = model.training
    model.eval()
    features, logits, seen = [], [], []
    for images, targets in loader:
        with runtime.autocast():
            batch_features, batch_logits = features_and_logits(model, runtime.put(images))
        features.append(batch_features.float().cpu())
        logits.append(batch_logits.float().cpu())
        seen.append(targets.cpu())
    model.train(training)
    given = torch.cat(seen)
    if not np.array_equal(given.numpy(), labels):
        raise ValueError("the loader does not give the source's samples in order; use one without shuffling and with all samples")
    all_logits = torch.cat(logits)
    losses = F.cross_entropy(all_logits, given, reduction="none")
    return Scan(labels, losses.numpy(), all_logits.numpy(), torch.cat(features).numpy(), fingerprint)


class EarlyScan:
    """Watches a network train: an ordered pass after each epoch, until what it shows is settled.

    When poison stands apart depends on the attack: on CIFAR-10 with 10 % BadNets the lowest 5 % of losses are all poison
    after epochs 3 to 5 and hardly any are after epochs 1 and 2. So when to read is decided by what the data shows.

    Args:
        loader: Ordered batches of the source, without augmentation.
        labels: (N,) labels of the source.
        look: Called with each pass; true ends the scan.
        runtime: Device and precision.
        fingerprint: Fingerprint of the source.
    """

    def __init__(
        self, loader: Batches, labels: NDArray[np.int64], *, look: Callable[[Scan], bool], runtime: Runtime, fingerprint: str
    ) -> None:
        self.loader, self.labels, self.look = loader, labels, look
        self.runtime, self.fingerprint = runtime, fingerprint
        self.last: Scan | None = None

    def __call__(self, model: nn.Module, epoch: int) -> bool:
        """To be called after each epoch, counted from 1. Returns: whether to stop training."""
        seen = scan_model(model, self.loader, self.labels, runtime=self.runtime, fingerprint=self.fingerprint)
        if not np.isfinite(seen.losses).all():
            raise ValueError(f"the scan's loss is not finite after epoch {epoch}; lower scan.lr")
        self.last = dataclasses.replace(seen, epoch=epoch)
        return self.look(self.last)
