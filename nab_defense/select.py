"""Which samples become suspects: the textbook's fixed share, or seeds that are expanded only where the data shows two groups."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from .content import ALIKE
from .mixture import ONE_THREAD, split_in_two
from .principal import Rows, Standardized, project
from .scan import Scan
from .types import SuspectReport

__all__ = [
    "BALANCED", "CLEAR_IMPRINT", "MIN_SEEDS", "MIN_SEPARATION", "MIN_VALLEY", "Group", "Selection", "expand", "grow", "probe",
    "take_fraction",
]  # fmt: skip

MIN_SEPARATION = 2.0  # Ashman's D: below it a mixture of two normals does not separate [Ashman et al. 1994]
MIN_VALLEY = 0.25  # the density between the groups must fall this far below the lower of its peaks
MIN_LEAD = 0.8  # share of pairs in which a suspect has a lower loss than a sample of another class that is named right
MIN_SEEDS = 20
BALANCED = 0.4  # share of a class above which its smaller part may as well be the clean one
MIN_IMPRINT = 0.5  # share of other images that what a group shares must turn to be called a trigger
CLEAR_IMPRINT = 0.75  # beyond doubt, even where the group is most of its class, whose content turns up to .65
MAX_NAMED = 0.25  # of a group that is not what its label says: share named so by a network that never saw it
MOST_NAMED = 0.6  # of one whose content comes second: beside poison that was not left out up to .54 were named so
MIN_SPREAD = 0.75  # its names, as mixed as content is (entropies): half of CIFAR-10's airplanes .5 to .7, poison .78 and more
MIN_STRANGE, FEW_STRANGE = 0.1, 0.3  # see Group.strange, set on digits; of few classes: half of a harmless one of five had .13
MIN_CONTENT = 0.1  # see Group.content; on digits poison had .12 to .4, of which half was harmless where it had the least
MIN_VARIED = 0.9  # see Group.varied; on digits: styles and clean halves .80 at most, filtered images .94 and more
MIN_ALIKE = 0.5  # or this share of the classes must have a part that shares the same; of digits three of ten have such a style
MIN_BEYOND = 0.2  # see Group.beyond; on digits in two to five classes: styles .08 at most, poison .32 or more
FEW_BEYOND = 0.05  # of fewer than MIN_SEEDS samples; on digits: harmless .01 at most, 13 of a trigger that is learned .1 to .5
SOME_COVERS = 0.05  # how clearly covers of other classes must carry what it shares, see naming.carried; of 93 styles none (.005)
MIN_SOURCE = 0.025  # that, times how many images of one class it turns; poison of one source class .04 and more
FOLDS = StratifiedKFold(3, shuffle=True, random_state=0)  # shuffled: folders are sorted by class
ROUNDS = 4  # of probing and splitting; on CIFAR-10 the group stands still after two to four
OTHERS = 5000  # samples of other classes that a probe is fitted to: all of them would cost the square of the classes


@dataclass(frozen=True)
class Group:
    """What splitting one class in two showed.

    Args:
        label: The class.
        seeds: Seeds with this label.
        separation: Ashman's D of the two groups, >= 0.
        valley: Depth of the density between them relative to the lower peak, in [0, 1]; 0: one hump.
        size: Samples in the seeds' group.
        lead: How surely a sample of the group has a lower loss than one of another class that the network names right (AUROC),
            in [0, 1].
        imprint: Share of other images that what the group shares turns to its class (see imprint.imprints); None: not tried.
        share: Share of its class that it was when that was tried, in [0, 1].
        named, sure, spread: What a network that never saw the group makes of it (see naming.naming), and `named` of all that
            are alike; None: not tried.
        source, every: Share that what it shares turns of the images of one class, the most of all, and of the others on average,
            less those that it turns in a network that never saw the group; None: not tried.
        carried: How clearly some images of others show it, too (see naming.carried), in [0, 1]; None: not tried.
        alike: Share of the classes that have a part which shares what it shares (see content.alike); 0: it has nothing like it.
        same: Cosine of what it shares beyond content and of what the accused of its class share; None: not tried.
        content: How surely a network that never saw its class names it, or a part of the class that is more foreign, times how
            variously, less what is typical of classes (see outside.foreign_parts), in [-1, 1]; None: not tried, and by what one
            that never saw the group makes of it (`strange`) instead.
        beyond: Share of other images that what it shares beyond how images vary turns (see hidden.hidden); None: not tried.
        varied: `spread` by one that was trained on varied images; 0 where it names it as labelled; None: not tried.
        few: There are few classes, and beside each hardly another to turn to.
        doubted: Of its class others are accused, for a trigger in doubt or as clean-label poison, which may be its clean half.
    """

    label: int
    seeds: int
    separation: float
    valley: float
    size: int
    lead: float
    imprint: float | None = None
    share: float = 0.0
    named: float | None = None
    sure: float | None = None
    spread: float | None = None
    source: float | None = None
    every: float | None = None
    carried: float | None = None
    alike: float = 0.0
    same: float | None = None
    content: float | None = None
    beyond: float | None = None
    varied: float | None = None
    few: bool = False
    doubted: bool = False

    @property
    def distinct(self) -> bool:
        return self.separation > MIN_SEPARATION and self.valley > MIN_VALLEY and self.size >= MIN_SEEDS

    @property
    def acquitted(self) -> bool:
        """It stood apart and shares no trigger: a class may fall in two by itself, or because half of its labels are wrong."""
        needed = CLEAR_IMPRINT if self.share > 1 - BALANCED else MIN_IMPRINT
        return self.imprint is not None and self.imprint < needed and not self.foreign

    @property
    def cleared(self) -> bool:
        """It was asked what a network that never saw it makes of it, and nothing accuses it."""
        return (self.named, self.content) != (None, None) and not self.foreign

    @property
    def foreign(self) -> bool:
        """Its images show what many other classes show; or are named after few and show a trigger, which turns images of all, or
        of one and is on covers, too, is in parts of other classes, or in the accused of its own: labels that no content explains;
        or show what no image does by nature, which turns others."""
        many = (self.spread or 0) > MIN_SPREAD and self.strange > (FEW_STRANGE if self.few else MIN_STRANGE)
        if self.content is not None:
            many = self.content > MIN_CONTENT and (not self.doubted or (self.spread or 0) > MIN_SPREAD)
        many &= (self.named or 0) < MOST_NAMED
        source, covers = self.source or 0, self.carried or 0
        one_class = covers > SOME_COVERS and source * covers > MIN_SOURCE
        trigger = one_class or self.alike >= MIN_ALIKE or (self.same or 0) >= ALIKE
        trigger |= (self.every or 0) >= (CLEAR_IMPRINT if self.few else MIN_IMPRINT)
        return (many and not self.alike) or (self.unlike and trigger) or self.unnatural or (self.varied or 0) > MIN_VARIED

    @property
    def unnatural(self) -> bool:
        """It shows what no image does by nature, and that turns others."""
        return (self.beyond or 0) > (MIN_BEYOND if self.size >= MIN_SEEDS else FEW_BEYOND)

    @property
    def strange(self) -> float:
        """How surely a network that never saw it names it, its own label left out, and how variously, multiplied: a style
        resembles one or two classes, and the network is at a loss with it; content of many classes is named after each."""
        return (self.sure or 0) * (self.spread or 0)

    @property
    def unlike(self) -> bool:
        """A network that never saw it names it after other classes."""
        return self.named is not None and self.named < MAX_NAMED


@dataclass(frozen=True, eq=False)
class Selection:
    """Which samples are accused, and why.

    Args:
        suspect: (N,) bool.
        doubt: (N,) in [0, 1], probability of belonging to a group that stands apart, also of samples that are not suspects.
        groups: The evidence for each examined class.
    """

    suspect: NDArray[np.bool_]
    doubt: NDArray[np.float32]
    groups: tuple[Group, ...] = field(default=())


def take_fraction(report: SuspectReport, fraction: float) -> Selection:
    """The most suspicious `fraction`, whatever it holds: the paper's rule [NAB, arXiv:2307.15539, section 5.1: 5 %]."""
    suspect = report.select(fraction)
    return Selection(suspect, suspect.astype(np.float32))


def expand(
    report: SuspectReport, scan: Scan, *, fraction: float, previous: Selection | None = None, trained: bool = False
) -> Selection:
    """Seeds and expansion: from the most suspicious few to the whole group they belong to, if there is such a group.

    For each class with enough seeds, the top `fraction` of the report, a linear probe on the scan's features tells them from
    all other samples, and a mixture of two normals splits its scores within the class; the higher group takes their place,
    a few times over. Where two groups with a valley between them remain, the higher one is suspect, if it leaves MIN_SEEDS
    samples of its class to compare it with. Otherwise its size, and so the poison rate, is never asked for. A class whose scores
    stay one hump is left alone: on clean data the seeds are merely the easiest images of a continuum.

    Losses tell poison apart only for a while, features from then on: a group found on an earlier pass is grown again on this
    one, and stands wherever this pass shows none that is more distinct.

    Args:
        report: Any detector's.
        scan: What it looked at.
        fraction: Share of samples taken as seeds, in (0, 1); MIN_SEEDS samples at least.
        previous: What an earlier pass of the same network showed; with `trained`, suspects that are known and left aside.
        trained: The network was trained to the end, where all losses are low: start from the more suspicious half of each class
            that falls in two by itself, not from seeds, and accuse it only if it is learned better than the other classes.
    """
    previous = previous or Selection(np.zeros(len(scan), dtype=bool), np.zeros(len(scan), dtype=np.float32))
    seeds = report.select(max(fraction, min(0.5, (MIN_SEEDS + 0.5) / len(scan))))  # of a small set the share is less than a group
    features = Standardized(scan.features)
    right = scan.logits.argmax(1) == scan.labels
    counts = np.bincount(scan.labels[seeds], minlength=scan.num_classes)
    suspect, doubt, groups = previous.suspect.copy(), previous.doubt.copy(), []
    for label in range(scan.num_classes):
        members = (scan.labels == label) & ~(previous.suspect & trained)
        start = _half(features, members, report.scores) if trained else seeds & members
        starts = [start, previous.suspect & members]
        rivals = right & ~members & trained  # else nobody asks for the lead
        grown = [grow(features, members, start, scan.losses, rivals) for start in starts if start.sum() >= MIN_SEEDS]
        if not grown:
            continue
        group, likely = max(grown, key=lambda pair: (pair[0].distinct, pair[0].separation))
        old = next((g for g in previous.groups if g.label == label and g.distinct), None)
        enough = members.sum() - group.size >= MIN_SEEDS  # of the rest, to tell what is content of the class
        accused = group.distinct and enough and not (trained and group.lead < MIN_LEAD)
        if accused:
            doubt[members], suspect[members] = likely, likely > 0.5
        groups.append(old if old and not accused else dataclasses.replace(group, label=label, seeds=int(counts[label])))
    return Selection(suspect, doubt, tuple(groups))


def _half(features: Rows, members: NDArray[np.bool_], scores: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The more suspicious half of a class that falls in two along its top singular direction [Tran et al. 2018]; else nobody.

    On CIFAR-10 the classes of clean data stay one hump (valley below .1), and backdoored ones have a valley of .2 to 1 once
    the network obeys the trigger."""
    half = np.zeros_like(members)
    if members.sum() < 2 * MIN_SEEDS:
        return half
    likely, separation, valley = split_in_two(project(features, np.flatnonzero(members), 1)[:, 0])
    if separation > MIN_SEPARATION and valley > MIN_VALLEY:
        upper, inside = likely > 0.5, scores[members]
        half[members] = upper if roc_auc_score(upper, inside) > 0.5 else ~upper
    return half


def probe() -> LogisticRegression:
    return LogisticRegression(C=0.1, class_weight="balanced", max_iter=200)


@ONE_THREAD
def grow(
    features: Rows,
    members: NDArray[np.bool_],
    start: NDArray[np.bool_],
    losses: NDArray[np.float32],
    rivals: NDArray[np.bool_],
    *,
    few: bool = False,
) -> tuple[Group, NDArray[np.float64]]:
    """Probe and split, a few times over; `rivals` are the samples of other classes that are named right. With `few` the split
    starts from the means of the group and of the rest, since k-means would overlook a few among many.

    Returns: the evidence, and each member's probability of the higher group."""
    rows = np.flatnonzero(members | _some(~members))
    told, inside, group = features[rows], members[rows], start[rows]
    first, copies = _without_repeats(told, inside)
    own_copies, told, inside = copies[inside], told[first], inside[first]
    group = np.isin(np.arange(len(first)), copies[group])
    if group.sum() < 2 * FOLDS.n_splits:  # hardly anything but copies
        return Group(-1, 0, 0.0, 0.0, 0, 0.0), np.zeros(len(own_copies))
    for _ in range(ROUNDS):
        # Out-of-fold, since a probe with many features tells any samples it was fitted to from the rest.
        values = cross_val_predict(probe(), told, group, cv=FOLDS, method="decision_function")
        own, among = values[inside], group[inside]
        means = (float(own[~among].mean()), float(own[among].mean())) if few and not among.all() else None
        likely, separation, valley = split_in_two(own, means)
        grown = np.zeros_like(group)
        grown[inside] = likely > 0.5
        if (valley == 0 and separation <= MIN_SEPARATION) or grown.sum() < MIN_SEEDS:
            break  # one hump; a small group beside a large one is hidden in its slope until the probe tells them better
        if (grown == group).all():
            break  # it stands still
        group = grown
    every = np.zeros(len(first))
    every[inside] = likely
    likely = every[own_copies]
    low, others, lead = losses[members][likely > 0.5], losses[rivals], 0.0
    if min(len(low), len(others)) >= MIN_SEEDS:
        lead = float(roc_auc_score([1] * len(low) + [0] * len(others), -np.r_[low, others]))
    return Group(-1, 0, separation, valley, len(low), lead), likely


def _without_repeats(told: NDArray[Any], inside: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of (M, D) features the rows of the first of those that are alike, of members and of others, and (M,) the place of each
    row's first among these: a probe that was fitted to a copy of a sample knows it."""
    first, places, copies = list[int](), dict[tuple[bytes, bool], int](), np.zeros(len(told), dtype=np.int64)
    for row, values in enumerate(told.astype(np.float16)):
        copies[row] = places.setdefault((values.tobytes(), bool(inside[row])), len(first))
        if copies[row] == len(first):
            first.append(row)
    return np.array(first), copies


def _some(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """At most OTHERS of it, always the same ones."""
    chosen = np.zeros_like(mask)
    chosen[np.random.default_rng(0).permutation(np.flatnonzero(mask))[:OTHERS]] = True
    return chosen
