"""Two ranks on the CPU, by torchrun itself: they find and train what one process does, and end well when one is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nab_defense import io
from nab_defense.cli import main
from tests.digits_runs import BLEND, ROOT, contents, write_recipe
from tests.distributed import laws

PATIENCE = 240  # seconds
SMALL = "model.kwargs.channels=[8,16,16,32]"
LONG = {**BLEND, "train": {"epochs": 30}}  # long enough to be cut short
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(*command: str | Path, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    argv = [*LAUNCH, *options, *map(str, command)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit status, output, errors."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, out, err


def said(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("error: ")]


def kill_a_rank(process: subprocess.Popen[str], number: int) -> None:
    """Kill one of torchrun's processes as the system would."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.pid and f"\0RANK={number}\0" in "\0" + (place / "environ").read_text():
                os.kill(int(place.name), signal.SIGKILL)
                return
        except (OSError, ValueError):  # ended meanwhile
            continue
    raise AssertionError("no such rank")


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    begun = time.monotonic()
    while not path.exists():
        assert process.poll() is None and time.monotonic() - begun < PATIENCE, process.communicate(timeout=30)
        time.sleep(0.05)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("laws")
    status, _, errors = ended(start(ROOT / "tests" / "distributed" / "laws.py", folder))
    assert status == 0, errors
    return folder


def test_what_ranks_tell_each_other(told: Path) -> None:
    first, second = (io.load_json(told / f"told{rank}.json") for rank in (0, 1))
    assert first["same"] == second["same"] == "rank 0" and first["total"] == second["total"] == [1, 1.0]
    assert first["order"] == second["order"] == [[0], [1], [2, 2], [3, 3], [4, 4, 4]]
    assert first["first"] == second["first"] == [1, True, 0]  # the first rank did it, as if it were alone
    assert [[len(part) for part in parts] for parts in (first["parts"], second["parts"])] == [[7] * 14, [8] * 14]
    torch.manual_seed(5)
    whole = [labels.tolist() for _, labels in laws.loaders()(laws.SOURCE, "none", 15, training=True)]
    assert [one + two for one, two in zip(first["parts"], second["parts"], strict=True)] == whole
    assert first["spoken"] == [1.0]
    assert io.load_json(told / "once.json") == 0


@pytest.mark.parametrize("case", laws.CASES)
def test_gradients_are_averaged_over_the_whole_batch(told: Path, case: str) -> None:
    network, history = laws.trained(laws.CASES[case])
    left = [io.load_state(told / f"weights{rank}.pt") for rank in (0, 1)]
    for name, weight in network.state_dict().items():
        assert torch.equal(left[0]["weights"][case][name], left[1]["weights"][case][name])
        torch.testing.assert_close(left[0]["weights"][case][name], weight, rtol=1e-4, atol=1e-5)
    assert not torch.equal(network.head.weight, laws.Network().head.weight)
    assert left[0]["loss"][list(laws.CASES).index(case)] == pytest.approx(history[-1]["loss"], rel=1e-4)


def test_ordered_passes_give_the_bits_of_one_process(told: Path) -> None:
    expected = laws.passes()
    for rank in (0, 1):
        found = io.load_state(told / f"passes{rank}.pt")["passes"]
        assert len(found) == len(expected) == 6
        assert all(np.array_equal(a.numpy(), b) for a, b in zip(found, expected, strict=True))


def exit_status(out: Path) -> int:
    """What torchrun makes of the end of a run: 1 also where the run says that the model is not protected."""
    return 0 if io.load_json(out / "result.json")["verdict"]["protected"] else 1


def same_findings(one: Path, two: Path, plan: str = "plan.npz") -> None:
    assert (one / "suspects.csv").read_bytes() == (two / "suspects.csv").read_bytes()
    first, second = (io.load_arrays(folder / plan) for folder in (one, two))
    assert first[0]["suspect"].sum() > 50
    assert first[0].keys() == second[0].keys() and first[1] == second[1]
    assert all(np.array_equal(first[0][name], second[0][name]) for name in first[0])


@pytest.mark.slow
def test_training_a_killed_rank_and_going_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, **LONG)
    out = tmp_path / "two"
    process = start(ROOT / "tools" / "train.py", recipe, "--out", out)
    wait_for(out / "stages" / "defended.state", process)
    kill_a_rank(process, 1)
    status, output, errors = ended(process)
    assert status == 1 and not output and len(said(errors)) == 1
    assert "another rank" in said(errors)[0] and "--resume" in said(errors)[0]
    left = len(io.load_state(out / "stages" / "defended.state")["history"])
    assert 1 <= left < 30 and not (out / "model.safetensors").exists()
    status, output, errors = ended(start(ROOT / "tools" / "train.py", recipe, "--resume", "--out", out))
    assert status == exit_status(out) and not said(errors), errors
    assert "Warning" not in errors
    assert output.count("written to") == 1 and "defended, stamped" in output
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors", "plan.npz", "result.json", "recipe.yaml", "suspects.csv", "stages"
    }  # fmt: skip
    assert not any(path.name.startswith(".") for path in out.rglob("*"))
    assert not any("module." in name for name in io.load_tensors(out / "model.safetensors")[0])
    assert "2 ranks" in io.load_json(out / "result.json")["hardware"]
    assert main(["train", str(recipe), "train.epochs=1", "data.test=null", "--out", str(tmp_path / "one")]) in (0, 3)
    same_findings(tmp_path / "one", out, "stages/plan.npz")  # one epoch is too few for a second look


def test_scan_finds_the_same_and_mistakes_are_said_once(tmp_path: Path) -> None:
    attack = ["--attack", "blend", "alpha=0.3", "--rate", "0.15", "--target", "0", "--limit", "800"]
    assert main(["poison", "digits", *attack, "--out", str(tmp_path / "images")]) == 0
    settings = ["scan.lr=0.005", "scan.epochs=6", "relabel.params.epochs=2", "runtime.threads=1", SMALL]
    assert main(["scan", str(tmp_path / "images"), *settings, "--out", str(tmp_path / "one")]) == 0
    status, output, errors = ended(start(ROOT / "tools" / "scan.py", tmp_path / "images", *settings, "--out", tmp_path / "two"))
    assert (status, output.count("written to")) == (0, 1), errors
    same_findings(tmp_path / "one", tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    status, output, errors = ended(start(ROOT / "tools" / "scan.py", "digits", "scan.epcohs=4", "--out", tmp_path / "three"))
    assert status == 1 and not output and len(said(errors)) == 1 and "'epochs'" in said(errors)[0]


@pytest.mark.slow
def test_purify_gives_what_one_process_gives(blend_run: Path, tmp_path: Path) -> None:
    arguments: list[Any] = ["--model", blend_run, "--checkpoint", blend_run / "stages" / "undefended.state", "--clean", "digits"]
    arguments += ["clean_limit=200", "--method", "finetune", "runtime.threads=1"]
    expected = main(["purify", *map(str, arguments), "--out", str(tmp_path / "one")])
    status, _, errors = ended(start(ROOT / "tools" / "purify.py", *arguments, "--out", tmp_path / "two"))
    assert (status > 0) == (expected > 0), errors
    one, two = (io.load_json(tmp_path / name / "result.json") for name in ("one", "two"))
    assert one["before"] == two["before"] and one["after"] == two["after"] and one["status"] == two["status"]


@pytest.mark.slow
def test_torchrun_starts_lost_ranks_again(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, **LONG)
    out = tmp_path / "out"
    process = start(ROOT / "tools" / "train.py", recipe, "--out", out, options=("--max-restarts", "1"))
    wait_for(out / "stages" / "defended.state", process)
    kill_a_rank(process, 0)
    left = len(io.load_state(out / "stages" / "defended.state")["history"])
    status, output, errors = ended(process)
    assert status == exit_status(out) and "written to" in output, errors
    assert 1 <= left < 30 and len(said(errors)) == 1
    assert len(io.load_state(out / "stages" / "defended.state")["history"]) == 30
