"""The tables of repairs that people read are those of the files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nab_defense.purify.base import hardly_turned
from tests.digits_runs import ROOT

METHODS = ("ibau", "distill", "polarizer", "rnp")
MODELS = ("badnets_8", "l2_inv_0", "trojan_wm_2")


def purified(method: str, model: str, seed: int) -> dict[str, float]:
    record = json.loads((ROOT / "results" / f"purify_{method}_{model}_seed{seed}.json").read_text())["models"]["purified"]
    return {name: record[name]["value"] for name in ("acc", "asr", "retuned")}


def rows(path: Path, start: str) -> Iterator[list[str]]:
    for line in path.read_text().splitlines():
        if line.startswith(f"| {start} |"):
            yield [cell.strip() for cell in line.strip("| \n").split("|")]


def shown(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"[01]?\.\d{3}", cell)]


@pytest.mark.parametrize("model", MODELS)
def test_every_seed_of_the_repairs_is_told_as_measured(model: str) -> None:
    found = list(rows(ROOT / "results" / "README.md", model))
    assert [int(row[1]) for row in found] == [0, 1, 2]
    for seed, row in enumerate(found):
        for method, cell in zip(METHODS, row[2:], strict=True):
            expected: Any = pytest.approx(list(purified(method, model, seed).values()), abs=6e-4)
            assert shown(cell) == expected, (method, seed)


@pytest.mark.parametrize("model", MODELS)
def test_the_first_table_of_repairs_is_the_worst_of_the_seeds(model: str) -> None:
    (row,) = rows(ROOT / "README.md", model)
    for method, cell in zip(METHODS, row[3:], strict=True):
        every = [purified(method, model, seed) for seed in range(3)]
        worst = min(one["acc"] for one in every), max(one["asr"] for one in every)
        assert shown(cell) == pytest.approx(worst, abs=6e-4), method


def test_what_is_called_repaired_left_little() -> None:
    records = [json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("purify_*.json"))]
    left = {True: [0.0], False: [0.0]}
    for record in records:
        if "purified" in record["models"]:
            left[hardly_turned(record["before"], record["after"])].append(record["models"]["purified"]["asr"]["value"])
    assert len(left[True]) == 51 and max(left[True]) < 0.08  # 50 and 6 in results/README.md, and 0.0
    assert len(left[False]) == 7 and max(left[False]) > 0.3  # so it is worth asking
