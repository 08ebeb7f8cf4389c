"""nab scan: a ranking of any folder, in report.json, suspects.csv and plan.npz; and help that lists examples."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nab_defense import replay
from nab_defense.bench.attacks import attacks
from nab_defense.bench.poison import read_truth
from nab_defense.cli import COMMANDS, main
from nab_defense.data import open_source
from nab_defense.detectors import detectors
from nab_defense.plan import load_plan
from tests.digits_runs import ROOT, contents, write_images

SMALL = "model.kwargs.channels=[8,16,16,32]"
QUICK = [
    "scan.lr=0.005",
    "scan.epochs=8",
    "data.mean=[0.306]",
    "data.std=[0.376]",
    "relabel.params.epochs=2",
    "runtime.threads=1",
    SMALL,
]


def test_a_poisoned_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "images", tmp_path / "out"
    attack = ["--attack", "blend", "alpha=0.3", "--rate", "0.15", "--target", "0", "--limit", "1200"]
    assert main(["poison", "digits", *attack, "--out", str(folder)]) == 0
    before = contents(folder)
    assert main(["scan", str(folder), *QUICK, "--out", str(out)]) == 0
    assert contents(folder) == before
    assert {path.name for path in out.iterdir()} == {"report.json", "suspects.csv", "plan.npz"}
    source, plan = open_source(str(folder)), load_plan(out / "plan.npz")
    plan.check_matches(len(source), source.fingerprint)
    report = json.loads((out / "report.json").read_text())
    assert report["samples"] == 1200 and report["suspects"] == int(plan.suspect.sum()) > 50
    assert report["fingerprint"] == source.fingerprint and report["irregular"] == {}  # grey, for a grey network
    assert (report["recipe"]["data"]["size"], report["recipe"]["model"]["in_chans"]) == (8, 1)
    with (out / "suspects.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    suspects = {row["id"] for row in rows if row["action"] != "stamped as cover"}
    assert suspects == {source.ids[i] for i in np.flatnonzero(plan.suspect)}
    truth = read_truth(tmp_path / "images.truth.csv", source)
    assert truth.poisoned[plan.suspect].mean() > 0.5 and plan.suspect[truth.poisoned].mean() > 0.8
    assert f"{len(suspects)} of 1200 samples are suspect labelled" in capsys.readouterr().out


@pytest.mark.parametrize("detector", detectors.names())
def test_every_detector_takes_color_images_of_any_size(detector: str, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", classes=3, each=12, edge=17)
    overrides = ["scan.epochs=1", "runtime.threads=1", SMALL]
    assert main(["scan", str(folder), "--detector", detector, *overrides, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"]["scan"]["detector"] == detector
    assert (report["recipe"]["data"]["size"], report["recipe"]["model"]["in_chans"]) == (17, 3)


def test_settings_reach_the_scan(tmp_path: Path) -> None:
    folder, out = write_images(tmp_path / "images", each=8, edge=12), tmp_path / "out"
    (folder / "c0" / "0.png").write_bytes(b"")
    overrides = ["data.strict=false", "model.in_chans=1", "data.size=10", "data.limit=14", "scan.epochs=1", SMALL]
    assert main(["scan", str(folder), *overrides, "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["samples"] == 14 and report["irregular"] == {"zero-byte": {"count": 1, "names": ["c0/0.png"]}}
    assert report["recipe"]["data"]["size"] == 10 and report["recipe"]["model"]["in_chans"] == 1


def test_a_run_is_not_overwritten(blend_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(blend_run)
    assert main(["scan", "digits", "--out", str(blend_run)]) == 2
    assert "holds a trained model" in capsys.readouterr().err and contents(blend_run) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and f"examples:\n  nab {command} " in shown
    for names in {"scan": detectors.names(), "evaluate": attacks.names(), "poison": attacks.names()}.get(command, []):
        assert names in shown


def test_help_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown and all(f"\n  {name} " in shown and f"nab {name} " in shown for name in COMMANDS)


def test_a_tool_by_itself() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "train.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "examples:" in done.stdout and done.stderr == ""


def test_another_detector_finds_what_it_would_find_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "images"
    attack = ["--attack", "blend", "alpha=0.3", "--rate", "0.15", "--target", "0", "--limit", "800"]
    assert main(["poison", "digits", *attack, "--out", str(folder)]) == 0
    trained: list[int] = []
    fit = replay.fit

    def counted(*args: Any, **knobs: Any) -> Any:
        history = fit(*args, **knobs)
        trained.append(len(history))
        return history

    monkeypatch.setattr(replay, "fit", counted)

    def scan(detector: str, cache: str) -> dict[str, bytes]:
        monkeypatch.setenv("NAB_CACHE", str(tmp_path / cache))
        out = tmp_path / f"{detector}_{cache}"
        assert main(["scan", str(folder), *QUICK, "scan.epochs=4", "--detector", detector, "--out", str(out)]) == 0
        return contents(out)

    scan("lga", "shared")
    assert len(trained) == 1
    second = scan("spectral", "shared")
    assert len(trained) == 1 or trained[1] > trained[0]  # nothing, or what the first did not reach
    before = len(trained)
    alone = scan("spectral", "own")
    assert len(trained) == before + 1 and second == alone
