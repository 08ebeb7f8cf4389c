"""What nab purify says at its end, and again where --resume finds that it had ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import io
from ..result import summarize_models
from .common import EXIT_UNPROTECTED

__all__ = ["close", "finished"]


def finished(out: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The result.json of a repair that ended in this folder; None where there is none, or not the model that it made.

    Args: asked: Settings by their names in result.json, None for what was not asked for.

    Raises:
        ValueError: It had other settings."""
    path = out / "result.json"
    result = io.load_json(path) if path.exists() else None
    if not isinstance(result, dict) or "candidates" not in result:
        return None
    if result["status"] == "accepted" and not (out / "model.safetensors").exists():
        return None
    differing = [name for name in asked if name != "ranked" and _content(result.get(name)) != _content(asked[name])]
    ranked = _content(result.get("ranked")) == _content(asked["ranked"])
    if "likely_target" in result["evidence"] and not ranked:  # else there was nothing to rank by
        differing.append("ranked")
    if differing:
        raise ValueError(f"{out} holds a repair with another {', '.join(differing)}; set it back, or name another --out")
    return result


def _content(told: Any) -> Any:
    """Without the path of what is told by its hash: it may have been moved, or be spelled otherwise."""
    hashes = {"sha256": "file", "fingerprint": "source"}
    paths = {path for content, path in hashes.items() if isinstance(told, dict) and content in told}
    return {key: value for key, value in told.items() if key not in paths} if paths else told


def close(result: dict[str, Any], classes: Sequence[str] | None, *last: str) -> int:
    """Print what came of a repair, then these lines. Returns: the command's exit status.

    Args:
        result: The content of result.json.
        classes: Their names; None: they have numbers."""
    lines = [*_table(result), *summarize_models(result["models"]), result["verdict"]["text"], *_hints(result, classes)]
    print("\n".join([*lines, *last]))
    return 0 if result["verdict"]["protected"] else EXIT_UNPROTECTED


def _table(result: dict[str, Any]) -> list[str]:
    rows = [{"name": "original", **result["before"]}, *result["candidates"]]
    wide = max(20, *(len(row["name"]) for row in rows))
    lines = [f"{'candidate':{wide}} {'accuracy':>8} {'turned':>8}"]
    for row in rows:
        mark = " <- taken" if row["name"] == result["chosen"] else ""
        lines.append(f"{row['name']:{wide}} {row['accuracy']:8.4f} {row['proxy']:8.4f}{mark}")
    return lines


def _hints(result: dict[str, Any], classes: Sequence[str] | None) -> list[str]:
    """At the attack's target: the class that perturbations turn most images to, and what rnp's forgetful network calls most."""

    def name(label: int) -> str:
        return str(label) if classes is None else repr(classes[label])

    before, evidence, lines = result["before"], result["evidence"], []
    if before["proxy"] > 0:
        lines.append(
            f"the perturbation that turns most images of the original, {before['proxy']:.2f} of them, turns them to"
            f" {name(before['class'])}: a hint at the attack's target, which can be wrong"
        )
    if "likely_target" in evidence:
        lines.append(
            f"having forgotten the clean images, the network calls {evidence['likely_target_share']:.2f} of them"
            f" {name(evidence['likely_target'])}: a hint at the target class"
        )
    return lines
