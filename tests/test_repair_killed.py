"""A training run that is killed while it purifies, or after, and is gone on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from nab_defense import pipeline
from nab_defense import repair as repairs
from nab_defense.kept import Kept
from nab_defense.pipeline import run
from nab_defense.purify.base import Judge
from nab_defense.recipe import load_recipe
from tests.digits_runs import write_recipe
from tests.test_repair import LIGHT, PAPER, same, timeless, weights


def test_killed_between_purification_and_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nab_defense.purify.base.choice.LEAST_GAIN", -1.0)
    recipe = load_recipe(write_recipe(tmp_path, **PAPER, purify={**LIGHT, "method": "polarizer", "params": {"steps": 4}}))
    whole = run(recipe, tmp_path / "whole")
    assert whole["purify"]["status"] == "accepted"

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("purified once more")

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "describe", kill)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "cut")
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    monkeypatch.setattr(repairs, "purify", again)
    cut = run(recipe, tmp_path / "cut", resume=True)
    assert same(weights(tmp_path / "whole" / "model.safetensors"), weights(tmp_path / "cut" / "model.safetensors"))
    assert cut["verdict"] == whole["verdict"] and cut["models"] == whole["models"]
    assert timeless(cut) == timeless(whole) and cut["seconds"]["purify"] > 0
    stages = tmp_path / "cut" / "stages"
    (stages / "finished.json").unlink()
    left = (stages / "purified.json").read_text()
    (stages / "purified.json").write_text(left.replace(whole["purify"]["data"]["fingerprint"], "that of other images"))
    once_more = run(recipe, tmp_path / "cut", resume=True)
    assert once_more["purify"]["stopped"] == "AssertionError: purified once more"


def test_killed_within_purification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nab_defense.purify.base.choice.LEAST_GAIN", -1.0)
    recipe = load_recipe(write_recipe(tmp_path, **PAPER, purify={**LIGHT, "method": "ibau", "params": {"steps": 4, "rounds": 2}}))
    whole = run(recipe, tmp_path / "whole")
    judge = Judge.__call__
    networks: list[nn.Module] = []

    def killed(self: Judge, network: nn.Module) -> dict[str, Any]:
        networks.append(network)
        if len(networks) == 3:  # the original and the first candidate are judged
            raise KeyboardInterrupt
        return judge(self, network)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Judge, "__call__", killed)
        run(recipe, tmp_path / "cut")
    assert (tmp_path / "cut" / "stages" / "purify" / "judged.state").exists()
    foreign = shutil.copytree(tmp_path / "cut", tmp_path / "foreign") / "stages" / "purify" / "key.json"
    foreign.write_text(json.dumps({**json.loads(foreign.read_text()), "clean": "other images"}))
    for name in ("cut", "foreign"):
        found = run(recipe, tmp_path / name, resume=True)
        assert timeless(found) == timeless(whole) and found["models"] == whole["models"]
        assert not (tmp_path / name / "stages" / "purify").exists()


def test_a_folder_of_other_files_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not of a run, and would be deleted; name another --out"):
        Kept(tmp_path, {})
    assert (tmp_path / "thesis.tex").exists()
