"""Which commit a result names, and what suspects.csv says of the accused."""

from __future__ import annotations

import csv
import dataclasses
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from nab_defense import result
from nab_defense.data import Source
from nab_defense.plan import Finding
from nab_defense.result import save_suspects
from nab_defense.select import Group
from nab_defense.types import NABPlan


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_a_commit_is_named_where_it_holds_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "venv" / "nab_defense"
    package.mkdir(parents=True)
    file = package / "result.py"
    file.write_text("first")
    monkeypatch.setattr(result, "__file__", str(file))
    named = result.commit.__wrapped__
    assert named() == ""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "other.txt").write_text("a project of somebody's")
    git(tmp_path, "add", "other.txt")
    git(tmp_path, "commit", "--quiet", "-m", "theirs")
    assert named() == ""  # installed inside another repository
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "ours")
    assert named() == git(tmp_path, "rev-parse", "HEAD")
    file.write_text("second")
    assert named() == git(tmp_path, "rev-parse", "HEAD") + "+"


ACCUSED = Group(0, 9, 4.5, 0.84, 3, 0.9, imprint=0.63)
REST = Group(0, 0, 1.5, 0.0, 3, 0.0, named=0.5, sure=0.4, spread=0.6, content=0.15, doubted=True)


SHOWN = Group(0, 0, 4.5, 0.84, 3, 0.0, imprint=0.1, beyond=0.63, few=True)


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ((ACCUSED, REST), "imprint 0.63"),
        ((REST, ACCUSED), "imprint 0.63"),
        (
            (dataclasses.replace(SHOWN, beyond=None, varied=0.98),),
            "on varied images, it is named as variously as others, 0.98 of",
        ),
        ((SHOWN,), "what it shares beyond how images vary turns 63 % of the others"),
    ],
)
def test_the_accused_are_given_their_own_evidence(groups: tuple[Group, ...], told: str, tmp_path: Path) -> None:
    assert REST.cleared and not ACCUSED.cleared and not ACCUSED.acquitted
    labels = np.zeros(6, dtype=np.int64)
    suspect = np.arange(6) < 3
    plan = dataclasses.replace(NABPlan.empty(labels), suspect=suspect, keep=~suspect)
    finding = SimpleNamespace(
        plan=plan,
        report=SimpleNamespace(scores=np.zeros(6), detector="lga"),
        selection=SimpleNamespace(groups=groups),
        confidence=np.ones(6),
    )
    source = SimpleNamespace(ids=[f"{i}.png" for i in range(6)], classes=("zero",))
    save_suspects(tmp_path / "suspects.csv", cast(Finding, finding), cast(Source, source))
    with (tmp_path / "suspects.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 3 and all("separation 4.5, valley 0.84" in row["evidence"] for row in rows)
    assert all(told in row["evidence"] for row in rows)


def test_of_odd_files_those_left_out_are_all_named_and_of_others_a_few() -> None:
    names = [f"{index}.png" for index in range(9)]
    source = cast(Source, SimpleNamespace(irregular={"grey": names, "palette": names[:2], "truncated": names}))
    assert result.oddities(source) == {
        "grey": {"count": 9, "names": names[:5]},
        "palette": {"count": 2, "names": names[:2]},
        "truncated": {"count": 9, "names": names},
    }
