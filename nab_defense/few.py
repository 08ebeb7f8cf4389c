"""A few samples of a class, too few to tell what they share from content by how many images it turns."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .imprint import imprints
from .parts import Part, few_of_a_class
from .scan import Scan
from .session import Session
from .variation import variation

__all__ = ["few_unnatural"]

log = logging.getLogger(__name__)


def few_unnatural(session: Session, trained: nn.Module, scan: Scan, aside: NDArray[np.bool_]) -> list[Part]:
    """Of each class fewer than select.MIN_SEEDS that stand apart and share what no image shows by nature, which turns others.

    The mean of so few holds much of their content, and turns .27 of other images on digits without any poison, hardly less than
    with a trigger (.39). Beyond the directions in which images vary nothing is left of that (.01), and enough of most triggers.

    Args:
        session: The run.
        trained: A network that was trained on all of it.
        scan: What it saw.
        aside: (N,) bool, samples that are accused, and left aside.

    Returns: of each such class the group, with what it turns in `beyond`, and for each sample (N,) the probability of being in
        it."""
    labels, parts = scan.labels, few_of_a_class(scan, aside)
    if not parts:
        return []
    directions = variation(session.ordered(session.source), labels, aside)
    masks, batches = [likely > 0.5 for _, likely in parts], session.ordered(session.source)
    rises = imprints(trained, batches, labels, masks, runtime=session.runtime, directions=directions)
    for (group, _), rise in zip(parts, rises, strict=True):
        log.info("class %d: %d samples alone, what they share turns %.2f", group.label, group.size, rise)
    asked = [(dataclasses.replace(group, beyond=rise), likely) for (group, likely), rise in zip(parts, rises, strict=True)]
    return [part for part in asked if part[0].unnatural]
