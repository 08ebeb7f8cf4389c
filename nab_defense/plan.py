"""From suspects and their proposed labels to a plan."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import io
from .scan import Scan
from .select import Group, Selection
from .types import NABPlan, SuspectReport

__all__ = [
    "COVERED", "Finding", "clean_label_groups", "load_finding", "load_plan", "make_plan", "paper_plan", "relabelled",
    "save_finding",
]  # fmt: skip

PLAN_ARRAYS = ("labels", "new_labels", "suspect", "keep", "cover")

MAX_DOUBT = 0.01
COVERED = "stamped as cover"  # what suspects.csv says of trusted images that carry the stamp


@dataclass(frozen=True, eq=False)
class Finding:
    """What came of looking at the data: the ranking, the accused, what to do, and the relabeller's confidence, (N,);
    `looked_again` is False where the trained network knew too little for a second look."""

    report: SuspectReport
    selection: Selection
    plan: NABPlan
    confidence: NDArray[np.float32]
    looked_again: bool = True

    @property
    def ranking(self) -> NDArray[np.float32]:
        """(N,), higher = more suspicious in the end: the accused before all others, then by doubt, then by the detector's score.

        That score alone tells little after a second look: it is the loss of a trained network, in which poison and all else are
        low, and it accused nobody."""
        facts = np.c_[self.plan.suspect, self.selection.doubt, self.report.scores]
        return np.unique(facts, axis=0, return_inverse=True)[1].reshape(-1).astype(np.float32)


def paper_plan(scan: Scan, suspect: NDArray[np.bool_], proposed: NDArray[np.int64]) -> NABPlan:
    """The textbook rule [NAB, arXiv:2307.15539, section 4]: every suspect takes its proposed label, and the stamp where that
    differs from its own. Nothing is dropped."""
    return NABPlan(scan.labels, proposed, suspect, np.ones(len(scan), bool), np.zeros(len(scan), bool), scan.fingerprint)


def make_plan(
    scan: Scan,
    suspect: NDArray[np.bool_],
    proposed: NDArray[np.int64],
    confidence: NDArray[np.float32],
    *,
    doubt: NDArray[np.float32],
    min_confidence: float,
    cover_fraction: float,
    seed: int,
) -> NABPlan:
    """Relabel and stamp only what is sure; drop the other suspects; stamp some trusted images too.

    The paper stamps relabelled suspects alone, so wrong labels and triggers pile up in the stamped world, which is the one
    that is shipped. Here a suspect is dropped when its label is in doubt, when the proposal is the label it has (its content
    may agree, its trigger would still be learned), and when most suspects of its class keep their label: then the poison is
    clean-label, and the few that differ are the relabeller's mistakes.

    Args:
        scan: What was scanned.
        suspect: (N,) bool.
        proposed: (N,) int64, the relabeller's labels.
        confidence: (N,) in [0, 1], its confidence.
        doubt: (N,) in [0, 1]; samples above MAX_DOUBT are not used as covers. A cover that is poison would teach the network
            to obey the trigger under the stamp: with 2.4 % poison among the covers ASR was 45 %.
        min_confidence: Below it a suspect is dropped.
        cover_fraction: Share of the samples that are stamped with their own label, in [0, 1); only where suspects are stamped.
        seed: Seed of the draw of covers.
    """
    sure = confidence >= min_confidence
    for group in clean_label_groups(scan.labels, proposed, suspect):
        sure &= ~group
    keep = ~suspect | (sure & (proposed != scan.labels))
    cover = np.zeros(len(scan), dtype=bool)
    if (suspect & keep).any():
        trusted = np.flatnonzero(~suspect & (doubt <= MAX_DOUBT))
        count = min(len(trusted), round(cover_fraction * len(scan)))
        # A stream of its own: an attacker in the same recipe draws his poison with the seed, and covers would be what was missed.
        cover[np.random.default_rng([seed, 4]).choice(trusted, size=count, replace=False)] = True
    return NABPlan(scan.labels, proposed, suspect, keep, cover, scan.fingerprint)


def clean_label_groups(
    labels: NDArray[np.int64], proposed: NDArray[np.int64], suspect: NDArray[np.bool_]
) -> list[NDArray[np.bool_]]:
    """The suspects of each label most of whose suspects are proposed that same label, as (N,) bool."""
    groups = [suspect & (labels == label) for label in np.unique(labels[suspect])]
    return [group for group in groups if (proposed[group] == labels[group]).mean() > 0.5]


def relabelled(plan: NABPlan) -> NDArray[np.bool_]:
    """(N,) bool: suspects with a proposed label other than their own, outside clean-label groups, whose own label is right."""
    groups = clean_label_groups(plan.labels, plan.new_labels, plan.suspect)
    return plan.suspect & plan.altered & ~np.any([np.zeros(len(plan), bool), *groups], axis=0)


def save_finding(path: Path, finding: Finding) -> None:
    """Write a finding to an npz file that `load_finding` and `load_plan` read."""
    plan, report, selection = finding.plan, finding.report, finding.selection
    arrays = {name: getattr(plan, name) for name in PLAN_ARRAYS}
    arrays |= {"scores": report.scores, "doubt": selection.doubt, "confidence": finding.confidence}
    groups = [dataclasses.asdict(group) for group in selection.groups]
    seen = {"detector": report.detector, "params": report.params, "groups": groups, "looked_again": finding.looked_again}
    meta = {"fingerprint": plan.fingerprint, **seen}
    io.save_arrays(path, arrays, meta)


def load_finding(path: Path) -> Finding:
    """Read what `save_finding` wrote.

    Raises:
        ValueError: No such file, or another kind of file.
    """
    plan, arrays, meta = _read_plan(path)
    try:
        report = SuspectReport(arrays["scores"], plan.labels, meta["detector"], meta["params"], plan.fingerprint)
        selection = Selection(plan.suspect, arrays["doubt"], tuple(Group(**group) for group in meta["groups"]))
        return Finding(report, selection, plan, arrays["confidence"], meta["looked_again"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is of another version of this package ({error}); run again without --resume") from None


def _read_plan(path: Path) -> tuple[NABPlan, dict[str, NDArray[Any]], dict[str, Any]]:
    arrays, meta = io.load_arrays(path)
    missing = [name for name in PLAN_ARRAYS if name not in arrays]
    if missing or not isinstance(meta, dict) or "fingerprint" not in meta:
        raise ValueError(f"{path} is not a plan of this package: it lacks {', '.join(missing) or 'its settings'}")
    return NABPlan(**{name: arrays[name] for name in PLAN_ARRAYS}, fingerprint=meta["fingerprint"]), arrays, meta


def load_plan(path: str | Path) -> NABPlan:
    """The plan that a scan or a training run left in its folder as plan.npz.

    Raises:
        ValueError: No such file, or another kind of file."""
    return _read_plan(Path(path))[0]
