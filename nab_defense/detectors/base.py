"""What every detector shares: the registry, the protocol and the making of a report."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..registry import Registry
from ..scan import Scan
from ..types import SuspectReport

__all__ = ["Detector", "detectors", "report"]


class Detector(Protocol):
    """Ranks the samples of a scan; how many of them are suspects is for `SuspectReport.select` to say."""

    def detect(self, scan: Scan) -> SuspectReport: ...


detectors: Registry[Detector] = Registry("detector")


def report(scan: Scan, scores: NDArray[Any], detector: Any) -> SuspectReport:
    """A report under the detector's registered name (its class name where it has none) with its knobs as params.

    Args:
        scan: What was scored.
        scores: (N,), higher is more suspicious.
        detector: The detector, a dataclass whose fields are JSON-able.

    Raises:
        ValueError: Scores have another length than the scan, or are not finite.
    """
    names = {detectors.get(name): name for name in detectors.names()}
    return SuspectReport(
        scores=np.asarray(scores, dtype=np.float32),
        labels=scan.labels,
        detector=names.get(type(detector), type(detector).__name__),
        params=asdict(detector),
        fingerprint=scan.fingerprint,
    )
