"""A run from source to shipped model: what it leaves, that it repeats bit for bit, and that it never asks for the truth."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nab_defense
from nab_defense import io, pipeline
from nab_defense.bench.truth import Truth
from nab_defense.cli import main
from nab_defense.defended import DefendedModel
from nab_defense.pipeline import run
from nab_defense.plan import Finding
from nab_defense.recipe import load_recipe
from nab_defense.session import Session
from nab_defense.train import TrainConfig
from nab_defense.types import NABPlan
from tests.digits_runs import BLEND, ROOT, contents, write_recipe


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return io.load_tensors(folder / "model.safetensors")[0]


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def plan_of(folder: Path) -> dict[str, Any]:
    return io.load_arrays(folder / "plan.npz")[0]


def check_measured(model: dict[str, Any], names: set[str]) -> None:
    assert set(model) == names
    for name in names - {"plain"}:
        assert set(model[name]) == {"value", "n", "low", "high"}
        assert 0 <= model[name]["low"] <= model[name]["value"] <= model[name]["high"] <= 1 and model[name]["n"] > 0


def test_result_has_the_promised_form(blend_run: Path) -> None:
    result = json.loads((blend_run / "result.json").read_text())
    promised = {"recipe", "seed", "commit", "hardware", "versions", "verdict", "seconds", "detection", "models"}
    assert promised <= set(result)
    assert result["recipe"] == io.load_yaml(blend_run / "recipe.yaml") and result["seed"] == 0
    assert isinstance(result["commit"], str) and isinstance(result["hardware"], str)
    assert {"torch", "timm"} <= set(result["versions"])
    found = result["detection"]
    assert isinstance(result["verdict"]["protected"], bool) and f"{found['selected']} of 800" in result["verdict"]["text"]
    assert {"scan", "train", "check", "undefended", "oracle", "total"} == set(result["seconds"])
    total = result["seconds"].pop("total")
    assert total == pytest.approx(sum(result["seconds"].values())) and min(result["seconds"].values()) > 0
    assert 0 < found["selected"] < found["altered"] < 800
    for rate in ("precision", "recall", "auroc", "relabel_accuracy"):
        assert 0 <= found[rate] <= 1
    assert found["precision"] > 0.95 and found["recall"] > 0.9
    assert set(result["models"]) == {"undefended", "oracle", "defended"}
    for name, model in result["models"].items():
        check_measured(model, {"acc", "asr", "ra", "retuned"} | ({"plain"} if name == "defended" else set()))
    check_measured(result["models"]["defended"]["plain"], {"acc", "asr", "ra", "retuned"})
    assert result["models"]["defended"]["acc"]["n"] == 60


def test_what_a_run_leaves(blend_run: Path) -> None:
    names = {path.name for path in blend_run.iterdir() if path.is_file()}
    assert names == {"model.safetensors", "plan.npz", "result.json", "recipe.yaml", "suspects.csv"}
    with (blend_run / "suspects.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["id", "label", "proposed", "score", "action", "evidence"]
    altered = json.loads((blend_run / "result.json").read_text())["detection"]["altered"]
    assert len(rows) == len({row["id"] for row in rows}) == altered
    actions = [row["action"] for row in rows]
    assert {"dropped", "relabelled and stamped", "stamped as cover"} == set(actions)
    suspects = [row for row in rows if row["action"] != "stamped as cover"]
    assert rows[: len(suspects)] == suspects and {row["label"] for row in suspects} == {"0"}
    scores = [float(row["score"]) for row in suspects]
    assert scores == sorted(scores, reverse=True)
    assert all(row["label"] == row["proposed"] for row in rows[len(suspects) :])


def test_the_shipped_model_keeps_its_stamp(blend_run: Path) -> None:
    model = nab_defense.load(blend_run)
    assert isinstance(model, DefendedModel) and not model.training
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    header = io.load_tensors(blend_run / "model.safetensors")[1]
    assert header["classes"] == [str(i) for i in range(10)] and header["input_size"] == 8
    assert header["verdict"] == json.loads((blend_run / "result.json").read_text())["verdict"]


def test_its_recipe_repeats_the_run_and_baselines_leave_no_mark(blend_run: Path, tmp_path: Path) -> None:
    run(load_recipe(blend_run / "recipe.yaml", ["baselines=[]"]), tmp_path / "again")
    assert same_weights(weights(blend_run), weights(tmp_path / "again"))
    assert (blend_run / "suspects.csv").read_bytes() == (tmp_path / "again" / "suspects.csv").read_bytes()
    first, second = plan_of(blend_run), plan_of(tmp_path / "again")
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_resume_of_a_finished_run_whose_test_images_changed(blend_run: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(blend_run, tmp_path / "run"))
    read = json.loads((out / "stages" / "finished.json").read_text())
    assert set(read) == {"data.source", "data.test"} and len(set(read.values())) == 2
    (out / "stages" / "finished.json").write_text(json.dumps({**read, "data.test": "of other images"}))
    with pytest.raises(ValueError, match=r"data\.test changed since the run in .*; leave out --resume to run again"):
        run(load_recipe(out / "recipe.yaml"), out, resume=True)


def test_resume_of_a_finished_run_changes_nothing(blend_run: Path, tmp_path: Path) -> None:
    before = contents(blend_run)
    result = run(load_recipe(blend_run / "recipe.yaml"), blend_run, resume=True)
    assert result == json.loads(before["result.json"]) and contents(blend_run) == before


def test_resume_makes_the_result_again_that_was_deleted(blend_run: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(blend_run, tmp_path / "run"))
    (out / "result.json").unlink()
    result = run(load_recipe(out / "recipe.yaml"), out, resume=True)
    assert result == json.loads((out / "result.json").read_text())
    assert same_weights(weights(blend_run), weights(out))


def test_truth_and_test_set_change_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "poisoned"
    attack = ["--attack", "blend", "alpha=0.3", "--rate", "0.15", "--target", "0", "--limit", "800"]
    assert main(["poison", "digits", *attack, "--out", str(folder)]) == 0
    blind = {**BLEND, "attack": None, "data": {"source": str(folder), "test": None, "limit": 700}}
    recipe = load_recipe(write_recipe(tmp_path, **blind))
    told = load_recipe(
        tmp_path / "tiny.yaml", [f"data.truth={folder}.truth.csv", "data.test=digits", "attack={name: sig, poison: false}"]
    )
    results = {name: run(which, tmp_path / name) for name, which in {"blind": recipe, "told": told}.items()}
    assert results["told"]["detection"]["precision"] > 0.5 and results["told"]["detection"]["recall"] > 0.8
    assert {"precision", "recall", "auroc"}.isdisjoint(results["blind"]["detection"]) and results["blind"]["models"] == {}
    assert results["blind"]["verdict"] == results["told"]["verdict"] and results["blind"]["verdict"]["found"]
    assert (tmp_path / "blind" / "suspects.csv").read_bytes() == (tmp_path / "told" / "suspects.csv").read_bytes()
    assert same_weights(weights(tmp_path / "blind"), weights(tmp_path / "told"))


def test_the_defense_never_looks_at_the_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    looked = Truth.__getattribute__

    def look(truth: Truth, name: str) -> Any:
        if closed and not name.startswith("__"):
            raise AssertionError(f"{closed[-1]} reads {name} of the truth")
        return looked(truth, name)

    def behind_a_wall(name: str, stage: Callable[..., Any]) -> Callable[..., Any]:
        def walled(*arguments: Any, **keywords: Any) -> Any:
            closed.append(name)
            try:
                return stage(*arguments, **keywords)
            finally:
                closed.pop()

        return walled

    monkeypatch.setattr(Truth, "__getattribute__", look)
    monkeypatch.setattr("nab_defense.purify.base.choice.LEAST_GAIN", -1.0)  # so that the repaired model is checked again
    for name in ("look", "look_again", "train", "defend", "check", "repair", "check_again"):
        monkeypatch.setattr(pipeline, name, behind_a_wall(name, getattr(pipeline, name)))
    overrides = ["train.epochs=1", "relabel.params.epochs=1"]
    purify = {"clean": "digits", "clean_limit": 60, "when": "always", "max_drop": 0.9, "params": {"rounds": 1, "steps": 2}}
    result = run(load_recipe(write_recipe(tmp_path, **BLEND, purify=purify), overrides), tmp_path / "run")
    assert result["purify"]["status"] == "accepted"
    assert result["detection"]["precision"] > 0.9  # the truth was there to be read
    session = Session(load_recipe(tmp_path / "tiny.yaml"), tmp_path / "run", resume=False)
    with pytest.raises(AssertionError, match="the test reads poisoned"):
        behind_a_wall("the test", lambda: session.truth.poisoned)()  # type: ignore[union-attr]


def test_clean_data_is_trained_as_ever(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, baselines=["undefended"], train={"epochs": 15}, data={"limit": 400})
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["verdict"]["found"] is False and result["verdict"]["protected"] is True
    assert "Nothing was found" in capsys.readouterr().out
    assert result["detection"]["selected"] == result["detection"]["altered"] == 0
    assert result["models"]["undefended"] == {k: v for k, v in result["models"]["defended"].items() if k != "plain"}
    session = Session(load_recipe(recipe), tmp_path / "other", resume=False)
    ordinary = pipeline.train(session, NABPlan.empty(session.source.labels), "ordinary")
    assert same_weights(weights(tmp_path / "run"), dict(ordinary.state_dict()))
    assert not isinstance(nab_defense.load(tmp_path / "run"), DefendedModel)


@pytest.mark.parametrize(("brief", "epochs"), [((2, 0), 2), ((1, 8), 3), ((9, 9), 4)])
def test_networks_that_only_name_content_are_trained_in_short(
    brief: tuple[int, int], epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 images in batches of 64, four epochs: 8 steps are more than two epochs."""
    trained: dict[str, int] = {}

    def fit(network: Any, loader: Any, *, train: TrainConfig, title: str, **others: Any) -> None:
        trained[title] = train.epochs

    def look_again(session: Session, network: Any, scanner: Any, before: Finding, *, without: Any) -> Finding:
        without(np.zeros(len(before.plan.labels), bool), "some")
        return before

    monkeypatch.setattr(pipeline, "BRIEF", brief)
    monkeypatch.setattr(pipeline, "fit", fit)
    monkeypatch.setattr(pipeline, "look_again", look_again)
    run(load_recipe(write_recipe(tmp_path, train={"epochs": 4})), tmp_path / "run")
    assert trained == {"defended": 4, "again0_without_some": epochs}


def test_states_of_networks_that_were_asked_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_again(session: Session, network: Any, scanner: Any, before: Finding, *, without: Any) -> Finding:
        without(np.zeros(len(before.plan.labels), bool), "some")
        assert len([*session.stages.glob("again0_without_some-*.state")]) == 1
        return before

    monkeypatch.setattr(pipeline, "look_again", look_again)
    run(load_recipe(write_recipe(tmp_path)), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "stages").glob("*.state")] == ["scan.state", "defended.state"]


def test_not_protected_is_said_and_returned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Clean-label poison keeps its label under the textbook rule, so nothing is stamped.
    sections: dict[str, Any] = {"attack": {"name": "sig", "rate": 0.08, "params": {"delta": 60}}, "scan": {"epochs": 6}}
    recipe = write_recipe(tmp_path, rule="paper", relabel={"name": "nearest_center", "params": {}}, **sections)
    assert main(["train", str(recipe), "data.limit=800", "--out", str(tmp_path / "run")]) == 3
    assert "Not protected" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "result.json").read_text())["verdict"]["protected"] is False


def test_killed_and_resumed_gives_the_same_bits(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, rule="paper", train={"epochs": 12, "batch_size": 16}, data={"test": None})
    run(load_recipe(recipe), tmp_path / "whole")
    command = [sys.executable, str(ROOT / "tools" / "train.py"), str(recipe), "--out", str(tmp_path / "cut")]
    state = tmp_path / "cut" / "stages" / "defended.state"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not state.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    done = len(io.load_state(state)["history"])
    assert 1 <= done < 12
    run(load_recipe(recipe), tmp_path / "cut", resume=True)
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert (tmp_path / "whole" / "suspects.csv").read_bytes() == (tmp_path / "cut" / "suspects.csv").read_bytes()


@pytest.mark.parametrize(("first", "later"), [(2**40, 0), (0, 2**40)], ids=["held", "read"])
def test_a_run_resumed_with_other_free_memory_gives_the_same_bits(
    first: int, later: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_recipe(tmp_path, rule="paper", train={"erase": 0.5}, data={"test": None}))
    monkeypatch.setattr("nab_defense.data.store._free_memory", lambda device: first)
    run(recipe, tmp_path / "run")
    whole = weights(tmp_path / "run")
    for name in ("finished.json", "defended.state"):
        (tmp_path / "run" / "stages" / name).unlink()
    monkeypatch.setattr("nab_defense.data.store._free_memory", lambda device: later)
    run(recipe, tmp_path / "run", resume=True)
    assert same_weights(weights(tmp_path / "run"), whole)
    run(recipe, tmp_path / "run")  # started over, it goes by the memory that is free now
    assert not same_weights(weights(tmp_path / "run"), whole)


@pytest.mark.parametrize(("size", "count"), [(64, 512), (128, 128), (224, 41), (1024, 32)])
def test_large_images_are_read_a_few_at_a_time(size: int, count: int, tmp_path: Path) -> None:
    session = Session(load_recipe(write_recipe(tmp_path), [f"data.size={size}"]), tmp_path / "run", resume=False)
    assert session._read == count
