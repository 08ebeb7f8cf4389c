"""The check after training, without truth: are the suspects' labels still obeyed, and what does that mean?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from . import ranks
from .content import Batches
from .imprint import imprints, picked
from .plan import clean_label_groups, relabelled
from .runtime import Runtime
from .select import MIN_SEEDS, Group
from .types import NABPlan

__all__ = ["Survival", "Verdict", "judge", "judge_again", "measure"]

SURVIVAL_LIMIT = 0.1  # share of suspects that may still go to their given label
LEARNED_MARGIN = 0.05  # above a guess, 1 / K


@dataclass(frozen=True)
class Survival:
    """How far the accused labels are still obeyed, shares in [0, 1]; None where there is nothing to measure.

    Args:
        relabelled: Suspects with a proposed label other than their own.
        plain, stamped: Share of these that the network still gives their old label, without and with the stamp.
        clean_label: Suspects whose proposed label is their own.
        imprint: On clean-label suspects, share of other images that turn to the suspects' label when what the suspects share
            beyond content is added to them; the natural share is taken off.
        learned: Share of the other images that the model, as shipped, gives their own label; mean over the classes.
    """

    relabelled: int
    plain: float | None
    stamped: float | None
    clean_label: int
    imprint: float | None
    learned: float | None = None


@dataclass(frozen=True)
class Verdict:
    """protected, and a sentence a person understands; found: whether the scan accused anything."""

    protected: bool
    found: bool
    text: str
    evidence: dict[str, Any]


@torch.inference_mode()
def measure(model: nn.Module, plain: nn.Module, batches: Batches, plan: NABPlan, *, runtime: Runtime) -> Survival:
    """Run all scanned images, in order and without augmentation, through the model, plain and stamped.

    Args:
        model: The model as it is shipped; normalised batches.
        plain: Its network without the stamp.
        batches: (images, labels) of the whole scanned source, in order.
        plan: What training changed.
    """
    groups = clean_label_groups(plan.labels, plan.new_labels, plan.suspect)
    altered = relabelled(plan)
    same = plan.suspect & ~altered
    rises = imprints(model, batches, plan.labels, groups, runtime=runtime)
    obeyed = _predicted(model, batches, np.ones(len(plan), bool), runtime) == plan.labels
    plain_rate = _share(_predicted(plain, batches, altered, runtime) == plan.labels[altered])
    return Survival(
        int(altered.sum()),
        plain_rate,
        _share(obeyed[altered]),
        int(same.sum()),
        max(rises, default=None),
        _per_class(obeyed[~plan.suspect], plan.labels[~plan.suspect]),
    )


def _predicted(model: nn.Module, batches: Batches, mask: NDArray[np.bool_], runtime: Runtime) -> NDArray[np.int64]:
    """The model's labels of the images in the mask."""
    model.eval()
    found = []
    for images, _ in picked(batches, mask, runtime):
        found.append(torch.zeros(0, dtype=torch.int64, device=images.device))
        if len(images):
            with runtime.autocast():
                found[-1] = model(images).argmax(1)
    return torch.cat(ranks.in_order(found)).cpu().numpy()


def _per_class(obeyed: NDArray[np.bool_], labels: NDArray[np.int64]) -> float | None:
    """Mean over the classes of the share that is named right: a network that only knows the largest class scores 1 / K."""
    return float(np.mean([obeyed[labels == label].mean() for label in np.unique(labels)])) if len(labels) else None


def _share(mask: NDArray[np.bool_]) -> float | None:
    return float(mask.mean()) if len(mask) else None


def judge(
    plan: NABPlan,
    survival: Survival,
    classes: tuple[str, ...],
    *,
    groups: tuple[Group, ...] = (),
    small: int = 0,
    looked_again: bool = True,
) -> Verdict:
    """Put the check into words.

    Args:
        plan: What training changed.
        survival: What was measured afterwards.
        classes: Names of the labels.
        groups: What the look at the data examined; those that were let go are named.
        small: Classes that have too few samples to find anything among.
        looked_again: False where the trained network knew too little for a second look.
    """
    evidence = {
        **asdict(survival),
        "suspects": int(plan.suspect.sum()),
        "stamped": int((plan.stamped & plan.keep & ~plan.cover).sum()),
        "dropped": int((~plan.keep).sum()),
        "covers": int(plan.cover.sum()),
        "changed": float(plan.changed.sum()) / len(plan),
        "acquitted": [asdict(group) for group in groups if group.acquitted],
        "crowded": [asdict(group) for group in groups if _crowded(group, plan)],
        "small_classes": small,
        "looked_again": looked_again,
    }
    protected, text = _sentence(plan, survival, classes, evidence)
    return Verdict(protected, evidence["suspects"] > 0, " ".join([text, *_remarks(classes, evidence)]), evidence)


def _crowded(group: Group, plan: NABPlan) -> bool:
    """It stood apart, and too few of its class are left to tell it by, so that it was neither tried nor accused."""
    own, tried = plan.labels == group.label, (group.imprint, group.named) != (None, None)
    return bool(group.distinct and not tried and not plan.suspect[own].any() and own.sum() - group.size < MIN_SEEDS)


def _remarks(classes: tuple[str, ...], evidence: dict[str, Any]) -> list[str]:
    """What was looked at and let go, and where nothing could be seen."""
    spared, crowded = (
        " and ".join(f"{group['size']} samples of class {classes[group['label']]!r}" for group in evidence[kind])
        for kind in ("acquitted", "crowded")
    )
    remarks = []
    if spared:
        remarks.append(f"{spared} stood apart and were let go: they share no trigger.")
    if crowded:
        remarks.append(f"{crowded} stood apart; fewer than {MIN_SEEDS} others are left to tell them by, so look at them.")
    if 0 < evidence["small_classes"] < len(classes):
        few = f"have fewer than {2 * MIN_SEEDS} samples, among which nothing can be found"
        remarks.append(f"{evidence['small_classes']} of the {len(classes)} classes {few}.")
    if not evidence["looked_again"]:
        remarks.append("There was no second look: the network names less than half of the images as they are labelled.")
    return remarks


def _sentence(plan: NABPlan, survival: Survival, classes: tuple[str, ...], evidence: dict[str, Any]) -> tuple[bool, str]:
    """Whether the model is protected, and why."""
    suspects, stamped, dropped, total = evidence["suspects"], evidence["stamped"], evidence["dropped"], len(plan)
    if _learned_nothing(plan, survival):
        return False, f"Not protected: the network learned nothing, {_right(survival)}."
    if not suspects and evidence["small_classes"] == len(classes):
        few = f"{total} samples are too few to find a group of poison among, less than {2 * MIN_SEEDS} in each class"
        return False, f"Not protected: {few}; add images."
    if not suspects:
        return True, (
            f"Nothing was found in {total} samples and nothing was changed: this is ordinary training. "
            "Poison that training learns no faster than clean images can escape this scan."
        )
    accused = ", ".join(repr(classes[i]) for i in np.unique(plan.labels[plan.suspect]))
    found = f"{suspects} of {total} samples are suspect (labelled {accused})"
    stamps = f"{stamped} were relabelled and stamped, {evidence['covers']} others stamped with their own label"
    done = f"{stamps}, {dropped} dropped, {100 * evidence['changed']:.1f} % of the set changed"
    if not stamped and not dropped:
        return False, f"Not protected: {found}, but nothing could be stamped or dropped."
    facts = "; ".join(_facts(survival)) or "nothing was left to measure"
    return not _survives(survival), f"{_start(survival)}: {found}; {done}; {facts}."


def judge_again(first: Verdict, plan: NABPlan, survival: Survival, *, repair: str, believed: bool) -> Verdict:
    """The verdict on a model that was repaired after its check: what is now, what was done, and what was before.

    Args:
        first: The verdict before the repair. Where there are no suspects to measure the repair on, it decides.
        plan: What training changed.
        survival: What was measured on the repaired model.
        repair: What was done, in a sentence.
        believed: Hardly anything turns the model still. Else what was not protected before is not now.
    """
    protected, facts = first.protected, "; ".join(_facts(survival))
    done = "repaired" if believed else "improved"
    start = done.capitalize() if protected else f"Not protected, though {done}"
    if _learned_nothing(plan, survival):
        protected, start, facts = False, "Not protected, the repaired network learned nothing", _right(survival)
    elif facts:
        protected, start = not _survives(survival), f"{_start(survival)}, after a repair"
        if protected and not (believed or first.protected):
            protected, start = False, "Not protected, as the repair is not believed"
    evidence = {**first.evidence, "after_repair": asdict(survival)}
    now = f"{start}: {facts or 'there are no suspects to check the repair on'}."
    return Verdict(protected, first.found, f"{now} {repair} Before the repair: {first.text}", evidence)


def _learned_nothing(plan: NABPlan, survival: Survival) -> bool:
    return survival.learned is not None and survival.learned <= 1 / len(np.unique(plan.labels)) + LEARNED_MARGIN


def _right(survival: Survival) -> str:
    assert survival.learned is not None
    return f"it names {100 * survival.learned:.0f} % of unsuspected training images right"


def _survives(survival: Survival) -> bool:
    return max(survival.stamped or 0.0, survival.imprint or 0.0) > SURVIVAL_LIMIT


def _start(survival: Survival) -> str:
    return "Not protected, the trigger survives" if _survives(survival) else "Protected against what was found"


def _facts(survival: Survival) -> list[str]:
    facts = []
    if survival.stamped is not None:
        facts.append(f"as shipped, {100 * survival.stamped:.1f} % of the relabelled still go to their old label")
    if survival.imprint is not None:
        facts.append(f"what the clean-label suspects share turns {100 * max(0.0, survival.imprint):.1f} % of other images")
    return facts


def small_classes(labels: NDArray[np.int64], classes: int) -> int:
    """How many of the classes have too few samples for a group to be found in any: MIN_SEEDS, and as many beside it."""
    return int((np.bincount(labels, minlength=classes) < 2 * MIN_SEEDS).sum())
