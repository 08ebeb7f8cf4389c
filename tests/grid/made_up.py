"""Cells with made-up figures, and the rows of a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nab_defense import io

__all__ = ["rate", "rows", "write"]


def rate(value: float) -> dict[str, Any]:
    """A rate with its interval."""
    return {"value": value, "n": 10, "low": value - 0.05, "high": value + 0.05}


def write(
    folder: Path, attack: str, defence: str, seed: int, asr: float | None, gap: float = 0.0, poison: float = 0.2, **more: Any
) -> None:
    """A finished cell below the folder.

    Args: more: Keys of its file to replace."""
    place = {"network": "resnet", "attack": attack, "rate": 0.0 if attack == "none" else poison, "seed": seed, "defence": defence}
    defended, undefended, oracle = ({"acc": rate(accuracy)} for accuracy in (0.9, 0.88, 0.92))
    if asr is not None:
        for twin, value in ((defended, asr), (undefended, 0.97), (oracle, 0.04)):
            twin["asr"] = rate(value)
    record = {
        "key": f"{attack}{defence}{seed}",
        "cell": place,
        "status": "done",
        "twins": {"undefended": undefended, "oracle": oracle},
        "figures": {"defended": defended, "acc_gap": gap, "detection": None, "rejects": None, "der": None},
        "config": {"recipe": {}, "defence": {"name": defence}},
        "wall_seconds": 1800,
    }
    io.save_json(folder / "cells" / f"{attack}-{defence}-{seed}.json", record | more)


def rows(page: str, start: str) -> list[list[str]]:
    """The fields of each row that starts like this."""
    lines = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return [[field.strip() for field in line.split("|")[1:-1]] for line in lines]
