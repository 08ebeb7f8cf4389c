"""The figures of a cell: each with its n and interval; what cannot be measured is null, never 0."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..bench.evaluate import Answers, Loader
from ..bench.metrics import (
    best_effectiveness,
    defense_effectiveness,
    detection_rates,
    difference,
    hits_at,
    paired,
    relabel_accuracy,
    share,
)
from ..defences import Outcome
from ..defended import DefendedModel
from ..types import Rate
from .case import Case

__all__ = ["WORKS", "attack_works", "figures"]

WORKS = 0.7  # undefended ASR below which an attack has failed by itself


def attack_works(twins: dict[str, dict[str, Any]]) -> bool | None:
    """Whether the undefended network obeys the trigger, of several each of them; None where there is none.

    Args: twins: figures of the undefended network and of the oracle."""
    undefended = twins["undefended"]
    found = undefended.get("least", undefended.get("asr"))
    return None if found is None else bool(found["value"] >= WORKS)


def figures(outcome: Outcome, case: Case, *, detects: bool = True) -> dict[str, Any]:
    """What came of a defence.

    Args: detects: Compare what it changed with the truth; not for the oracle, which was told."""
    given = case.answers(outcome.model)
    own = case.measured(outcome.model, given)
    stamped = outcome.model if isinstance(outcome.model, DefendedModel) else None
    return {
        "defended": own,
        "plain": None if stamped is None else case.measured(stamped.model),
        **_beside(given, case.oracle_answers, case.cases.triggers),
        **effectiveness(own, case.twins.figures["undefended"]),
        "altered": None if outcome.plan is None else asdict(share(outcome.plan.changed)),
        "detection": _detection(outcome, case) if detects else None,
        "relabel_accuracy": _relabelled(outcome, case) if detects else None,
        "rejects": None if stamped is None else _rejects(stamped, case),
        "poisoned": int(case.truth.poisoned.sum()),
    }


def _beside(own: Answers, oracle: Answers, triggers: NDArray[np.int64] | None) -> dict[str, Any]:
    """How much more a network obeys than the oracle, of several triggers the one where that is most, and what accuracy it lacks,
    on the same images."""
    excess = None
    if "asr" in own:
        parts = [np.ones(len(own["asr"]), bool)] if triggers is None else [triggers == one for one in np.unique(triggers)]
        excess = max((_less(own["asr"][part], oracle["asr"][part]) for part in parts), key=lambda rate: rate["value"])
    return {"excess_asr": excess, "acc_gap": _less(oracle["acc"], own["acc"])}


def _less(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> dict[str, Any]:
    value, low, high = paired(first, second)
    return {"value": value, "n": len(first), "low": low, "high": high}


def effectiveness(own: dict[str, Any], undefended: dict[str, Any]) -> dict[str, Any]:
    """DER, and the most it can be, of several triggers by the one that works best; null where there is no attack."""
    if "asr" not in own:
        return {"der": None, "der_ceiling": None}
    return {"der": _effectiveness(undefended, own), "der_ceiling": best_effectiveness(_obeyed(undefended)["value"])}


def _obeyed(rates: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = rates.get("worst", rates["asr"])
    return found


def _minus(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    value, low, high = difference(Rate(**first), Rate(**second))
    return {"value": value, "n": first["n"], "low": low, "high": high}


def _effectiveness(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """DER; its ends are those of both falls at once, so that its interval is wider than it need be."""
    asr, acc = _minus(_obeyed(before), _obeyed(after)), _minus(before["acc"], after["acc"])
    ends = {"value": "value", "low": "high", "high": "low"}  # what the fall of ACC takes off
    der = {end: defense_effectiveness((asr[end], acc[other]), (0.0, 0.0)) for end, other in ends.items()}
    return {"value": der["value"], "n": asr["n"], "low": der["low"], "high": der["high"]}


def _detection(outcome: Outcome, case: Case) -> dict[str, Any] | None:
    """How well it told poison from clean; None where it accuses no samples and ranks none."""
    plan, scores, poisoned = outcome.plan, outcome.scores, case.truth.poisoned
    if scores is None or plan is None:
        return None
    found = {
        **detection_rates(plan.suspect, scores, poisoned),
        "tpr_at_1pct": hits_at(scores, poisoned, false_alarms=0.01),
        "tpr_at_01pct": hits_at(scores, poisoned, false_alarms=0.001),
    }
    rates = {name: None if rate is None else asdict(rate) for name, rate in found.items()}
    return {"selected": int(plan.suspect.sum()), **rates}


def _relabelled(outcome: Outcome, case: Case) -> dict[str, Any] | None:
    rate = None if outcome.plan is None else relabel_accuracy(outcome.plan, case.truth.true_labels)
    return None if rate is None else asdict(rate)


def _rejects(model: DefendedModel, case: Case) -> dict[str, Any]:
    """Share of test images whose class the stamp changes, clean and triggered."""
    clean, triggered = case.cases.clean, case.cases.triggered
    return {
        "clean": _rejected(model, clean, case),
        "triggered": None if triggered is None else _rejected(model, triggered, case),
    }


def _rejected(model: DefendedModel, loader: Loader, case: Case) -> dict[str, Any]:
    runtime, found = case.session.runtime, []
    model.eval()
    for images, _ in loader:
        with torch.inference_mode(), runtime.autocast():
            found.append(model.rejects(runtime.put(images)).cpu())
    return asdict(share(np.asarray(torch.cat(found))))
