"""LGA: poison is learned first, so its loss is lowest early in training [Li et al. 2021, ABL, arXiv:2110.11571]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scan import Scan
from ..types import SuspectReport
from .base import detectors, report

__all__ = ["LGA", "lga_loss"]

FORMS = ("flooding", "per_sample")


def lga_loss(gamma: float, form: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss that keeps hard samples from being learned while easy ones, poison among them, fall below `gamma`.

    Args:
        gamma: Loss level in nats, > 0; .5 in both papers.
        form: "per_sample": mean of sign(l - gamma) * l [ABL, eq. 3]; "flooding": |mean(l) - gamma| + gamma, which the
            authors of NAB run, and whose gradient is that of the former taken on the batch mean.

    Returns:
        (logits (B, K), labels (B,)) -> scalar; any batch size, a last batch of one too.
    """
    if form not in FORMS:
        raise ValueError(f"the LGA form must be one of {', '.join(FORMS)}, got {form!r}")
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, labels, reduction="none")
        if form == "flooding":
            return (losses.mean() - gamma).abs() + gamma
        return (torch.sign(losses - gamma).detach() * losses).mean()

    return loss


@detectors.register("lga", source="arXiv:2110.11571")
@dataclass(frozen=True)
class LGA:
    """Scores a sample by how low its loss is at the epoch that the scan was read after."""

    def detect(self, scan: Scan) -> SuspectReport:
        return report(scan, -scan.losses, self)
