"""What a run leaves for people and programs: result.json and suspects.csv."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import io
from .bench.evaluate import to_dict
from .bench.metrics import detection, relabel_accuracy
from .bench.retune import IMAGES, STEPS
from .check import Verdict
from .data import Source
from .data.folder import BROKEN
from .plan import COVERED, Finding
from .runtime import Runtime
from .select import MIN_CONTENT, MIN_VARIED, Group
from .session import Session
from .types import EvalResult, NABPlan

__all__ = [
    "commit", "describe", "oddities", "provenance", "save_ranking", "save_suspects", "short", "summarize", "summarize_models",
]  # fmt: skip

PACKAGES = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "faiss-cpu", "albumentations")
COLUMNS = {"acc": "ACC", "asr": "ASR", "ra": "RA", "retuned": "ASR*"}
LEGEND = f"ASR*: the same after {STEPS} small steps on {IMAGES} triggered images with the attacker's label; compare the oracle's"
NAMED = 5  # files of one oddity
SUSPECTS = ("id", "label", "proposed", "score", "action", "evidence")
Models = dict[str, EvalResult | tuple[EvalResult, EvalResult]]


def describe(
    session: Session,
    finding: Finding,
    verdict: Verdict,
    models: Models,
    seconds: dict[str, float],
    repair: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of result.json; rates in [0, 1], those that need truth only where it is known.

    Args: repair: What the purify stage did; None where the recipe has none."""
    plan, groups = finding.plan, [dataclasses.asdict(group) for group in finding.selection.groups]
    measured: dict[str, Any] = {"selected": int(plan.suspect.sum()), "altered": int(plan.changed.sum())}
    if session.truth is not None:
        poisoned = session.truth.poisoned
        measured |= detection(plan.suspect, finding.ranking, poisoned)
        accuracy = relabel_accuracy(plan, session.truth.true_labels)
        if accuracy is not None:
            measured["relabel_accuracy"] = accuracy.value
    return {
        "recipe": json.loads(session.recipe.model_dump_json()),
        "seed": session.recipe.seed,
        **provenance(session.runtime),
        "verdict": dataclasses.asdict(verdict),
        "data": {"samples": len(plan), "fingerprint": session.source.fingerprint, "irregular": oddities(session.source)},
        "seconds": {**seconds, "total": sum(seconds.values())},
        "detection": {**measured, "groups": groups},
        **({} if repair is None else {"purify": repair}),
        "models": {name: _model(value) for name, value in models.items()},
    }


def oddities(source: Source) -> dict[str, Any]:
    """Kind of oddity -> how many files show it, and names: of all that were left out, of the first NAMED others."""
    found = source.irregular.items()
    return {kind: {"count": len(ids), "names": ids if kind in BROKEN else ids[:NAMED]} for kind, ids in found}


def provenance(runtime: Runtime) -> dict[str, Any]:
    """What made a result, besides its settings: commit, hardware, versions of packages."""
    return {"commit": commit(), "hardware": runtime.hardware(), "versions": {name: version(name) for name in PACKAGES}}


def _model(value: EvalResult | tuple[EvalResult, EvalResult]) -> dict[str, Any]:
    if isinstance(value, tuple):
        return {**to_dict(value[0]), "plain": to_dict(value[1])}
    return to_dict(value)


@functools.cache  # of a long run it is that which began it
def commit() -> str:
    """The commit of the package's checkout, with "+" when it has local changes; "" where the package is installed otherwise, also
    inside another repository. As it was when first asked for."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # fails unless this very file is tracked
        return git("rev-parse", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return ""


def short(commit: str) -> str:
    """Seven figures of a commit, with its "+"."""
    return commit[:7] + "+" * commit.endswith("+")


def _evidence(group: Group) -> str:
    shape = f"separation {group.separation:.1f}, valley {group.valley:.2f}"
    if group.unnatural:
        return f"{shape}; what it shares beyond how images vary turns {100 * (group.beyond or 0):.0f} % of the others"
    if group.foreign and (group.varied or 0) > MIN_VARIED:
        return f"{shape}; unseen, on varied images, it is named as variously as others, {group.varied:.2f} of their entropy"
    if group.foreign:
        others = f"that left out, it is foreign by {group.strange:.2f}"
        if (group.content or 0) > MIN_CONTENT:
            others = f"to a network that never saw the class it is foreign by {group.content:.2f}"
        if group.source is not None:
            others = f"imprint on the class of the others {group.source:.2f}"
        if group.same is not None:
            others += f", shares {group.same:.2f} of what the accused share"
        return f"{shape}; unseen, {100 * (group.named or 0):.0f} % of it gets this label, {others}"
    return f"{shape}, imprint {group.imprint or 0:.2f}"


def save_suspects(path: Path, finding: Finding, source: Source) -> None:
    """suspects.csv: a row for each suspected or changed sample, suspects first, the most suspicious on top."""
    plan, scores = finding.plan, finding.report.scores
    groups = sorted(finding.selection.groups, key=lambda group: not (group.cleared or group.acquitted))  # the accused last
    evidence = {group.label: _evidence(group) for group in groups}
    chosen = np.flatnonzero(plan.suspect | plan.changed)
    rows = []
    for i in chosen[np.lexsort((-scores[chosen], ~plan.suspect[chosen]))]:
        group = evidence.get(int(plan.labels[i]), "top of the ranking")
        why = f"{finding.report.detector}; {group}; label confidence {finding.confidence[i]:.2f}"
        if plan.cover[i]:
            why = "trusted; shows the network a clean image with the stamp"
        given, proposed = source.classes[plan.labels[i]], source.classes[plan.new_labels[i]]
        rows.append((source.ids[i], given, proposed, f"{scores[i]:.6g}", _action(plan, int(i)), why))
    io.save_csv(path, SUSPECTS, rows)


def save_ranking(path: Path, source: Source, scores: NDArray[np.float32], by: str) -> None:
    """suspects.csv of a ranking that accuses nobody: a row for each sample, the most suspicious on top.

    Args: scores: (N,), higher = more suspicious. by: What ranked them."""
    rows = []
    for place, i in enumerate(np.argsort(-scores, kind="stable"), 1):
        given = source.classes[source.labels[i]]
        rows.append((source.ids[i], given, given, f"{scores[i]:.6g}", "kept", f"{by}; {place} of {len(scores)}"))
    io.save_csv(path, SUSPECTS, rows)


def _action(plan: NABPlan, index: int) -> str:
    if not plan.keep[index]:
        return "dropped"
    if plan.cover[index]:
        return COVERED
    return "relabelled and stamped" if plan.stamped[index] else "kept"


def summarize(result: dict[str, Any]) -> list[str]:
    """The lines a person reads at the end of a run."""
    lines = summarize_models(result["models"])
    found = result["detection"]
    if "precision" in found:
        rates = (f"{name} {'-' if found[name] is None else format(found[name], '.3f')}" for name in ("precision", "recall"))
        lines.append(f"suspects: {found['selected']}, {', '.join(rates)}")
    took = ", ".join(f"{name} {value:.0f}" for name, value in result["seconds"].items())
    return [*lines, f"seconds: {took}", result["verdict"]["text"]]


def summarize_models(models: dict[str, Any]) -> list[str]:
    """A table of what was measured; nothing where nothing was."""
    lines = [f"{'model':20} " + " ".join(f"{title:>7}" for title in COLUMNS.values())] if models else []
    for name, model in models.items():
        if name == "defended":
            lines += [_row("defended, stamped", model), _row("defended, plain", model["plain"])]
        else:
            lines.append(_row(name, model))
    return [*lines, LEGEND] if any("retuned" in model for model in models.values()) else lines


def _row(name: str, model: dict[str, Any]) -> str:
    cells = " ".join(f"{model[key]['value']:7.4f}" if key in model else f"{'-':>7}" for key in COLUMNS)
    return f"{name:20} {cells}"
