"""The purify stage of a training run: when it runs, what it ships, what it says, and that a kill does not repeat it."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nab_defense
from nab_defense import io, pipeline
from nab_defense import repair as repairs
from nab_defense.cli import main
from nab_defense.data import open_source
from nab_defense.defended import DefendedModel
from nab_defense.pipeline import run
from nab_defense.purify import purify
from nab_defense.purify.ibau import IBAU
from nab_defense.recipe import load_recipe
from nab_defense.repair import _draw, read_clean
from nab_defense.schema import PurifyStage
from nab_defense.session import Session
from nab_defense.types import NABPlan
from tests.digits_runs import Mistakes, write_images, write_noise, write_recipe

LIGHT = {"clean": "digits", "clean_limit": 60, "params": {"rounds": 1, "steps": 2, "augment": False}}
PAPER: dict[str, Any] = {"rule": "paper", "relabel": {"name": "nearest_center", "params": {}}, "attack": {"name": "blend"}}


def weights(path: Path) -> dict[str, Tensor]:
    return io.load_tensors(path)[0]


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    told = dict(result["purify"])
    for record in (told, told["after"], *told["candidates"]):
        record.pop("seconds", None)
    return told


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def result_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


@pytest.fixture
def gain(monkeypatch: pytest.MonkeyPatch) -> Any:
    """gain(-1.0): any candidate is taken; gain(2.0): none is."""
    return lambda least: monkeypatch.setattr("nab_defense.purify.base.choice.LEAST_GAIN", least)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without the stage: one epoch, stamped, which learns nothing and is not protected."""
    folder = tmp_path_factory.mktemp("plain")
    result = run(load_recipe(write_recipe(folder, **PAPER)), folder / "run")
    assert not result["verdict"]["protected"] and "purify" not in result and "purify" not in result["seconds"]
    return folder / "run"


def run_with(folder: Path, *overrides: str, **stage: Any) -> dict[str, Any]:
    recipe = load_recipe(write_recipe(folder, **PAPER, purify={**LIGHT, "max_drop": 0.9, **stage}), overrides)
    return run(recipe, folder / "run")


@pytest.mark.parametrize(("when", "protected", "runs"), [
    ("never", False, False), ("never", True, False), ("unprotected", False, True),
    ("unprotected", True, False), ("always", False, True), ("always", True, True),
])  # fmt: skip
def test_when(when: str, protected: bool, runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Path) -> None:
    judged, called = pipeline.check, []

    def check(*given: Any) -> Any:
        return dataclasses.replace(judged(*given), protected=protected, text="As it was.")

    def stopped(_: Any, network: Any, *__: Any, **___: Any) -> Any:
        called.append(network.model)
        raise ValueError("stop here")
        yield

    monkeypatch.setattr(pipeline, "check", check)
    monkeypatch.setattr(IBAU, "candidates", stopped)
    result = run_with(tmp_path, when=when)
    assert len(called) == runs and ("purify" in result["seconds"]) is runs
    assert result["verdict"]["protected"] is protected  # a purifier that fails costs nothing but its time
    assert same(weights(tmp_path / "run" / "model.safetensors"), weights(plain / "model.safetensors"))
    if runs:
        assert isinstance(called[0], DefendedModel) and result["purify"]["status"] == "rejected"
        assert result["purify"]["stopped"] == "stop here" and result["purify"]["candidates"] == []
        assert result["verdict"]["text"] == "As it was. Not repaired, the model is shipped as it was: stop here."
    else:
        assert result["purify"] == {"status": "skipped", "when": when} and result["verdict"]["text"] == "As it was."


def test_a_repair_that_breaks_costs_the_training_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Path) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("nab_defense.repair.purify", broken)
    result = run_with(tmp_path)
    assert not (tmp_path / "run" / "stages" / "purified.json").exists()
    assert result["purify"]["status"] == "rejected" and result["purify"]["stopped"] == "RuntimeError: out of memory"
    assert result["verdict"]["text"].endswith("Not repaired, the model is shipped as it was: RuntimeError: out of memory.")
    assert same(weights(tmp_path / "run" / "model.safetensors"), weights(plain / "model.safetensors"))


def test_a_full_disk_ends_the_run_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise RuntimeError("[enforce fail] unexpected pos") from None  # as torch.save has it

    monkeypatch.setattr("nab_defense.repair.purify", full)
    with pytest.raises(RuntimeError, match="unexpected pos"):
        run_with(tmp_path)


def test_rejected(tmp_path: Path, gain: Any, plain: Path) -> None:
    gain(2.0)
    result, before = run_with(tmp_path), result_of(plain)
    told = result["purify"]
    assert told["status"] == "rejected" and told["chosen"] is None and told["after"] == told["before"]
    assert [row["name"] for row in told["candidates"]] == ["step 2"]
    assert same(weights(tmp_path / "run" / "model.safetensors"), weights(plain / "model.safetensors"))
    assert result["models"] == before["models"] and result["verdict"]["evidence"] == before["verdict"]["evidence"]
    assert result["verdict"]["text"] == f"{before['verdict']['text']} {told['text']}" and not result["verdict"]["protected"]
    assert told["text"].startswith(
        "Not repaired, the model is shipped as it was: even the best candidate, step 2, is turned hardly"
    )


def test_accepted(tmp_path: Path, gain: Any, plain: Path) -> None:
    gain(-1.0)
    result, before = run_with(tmp_path), result_of(plain)
    told = result["purify"]
    assert told["status"] == "accepted" and told["chosen"] == "step 2" and told["method"] == "ibau"
    assert told["params"]["steps"] == 2 and told["params"]["hold"] == 2.0  # all of them, as the method took them
    assert told["data"]["source"] == "digits" and told["data"]["n_fit"] + told["data"]["n_held"] == 60
    assert 0 <= told["before"]["obeyed"] <= told["before"]["proxy"] <= 1 and "obeyed" in told["after"]
    assert set(result["models"]) == {"defended", "purified"} and result["models"]["defended"] == before["models"]["defended"]
    assert set(result["models"]["purified"]) == {"acc", "asr", "ra", "retuned"} and result["seconds"]["purify"] > 0
    shipped, original = (weights(folder / "model.safetensors") for folder in (tmp_path / "run", plain))
    assert shipped.keys() == original.keys() and not same(shipped, original)
    assert same(shipped, weights(tmp_path / "run" / "stages" / "purified.safetensors"))
    assert isinstance(nab_defense.load(tmp_path / "run"), DefendedModel)
    verdict, first = result["verdict"], before["verdict"]
    assert not verdict["protected"]  # the network has learned nothing, and is repaired for nothing
    assert verdict["text"].startswith("Not protected, the repaired network learned nothing: it names")
    assert verdict["text"].endswith(f" {told['text']} Before the repair: {first['text']}")
    assert {k: v for k, v in verdict["evidence"].items() if k != "after_repair"} == first["evidence"]
    assert verdict["evidence"]["after_repair"]["learned"] < 0.2


def test_the_test_images_select_nothing(tmp_path: Path, gain: Any) -> None:
    gain(-1.0)
    noise = write_noise(tmp_path / "images")
    results = {}
    for name, test in (("digits", "digits"), ("noise", str(noise))):
        (tmp_path / name).mkdir()
        result = run_with(tmp_path / name, f"data.test={test}", params={**LIGHT["params"], "steps": 6, "rounds": 3})
        assert result["purify"]["status"] == "accepted" and len(result["purify"]["candidates"]) == 3
        results[name] = {**result, "purify": timeless(result)}
    assert results["digits"].pop("models") != results["noise"].pop("models")
    for result in results.values():
        assert result["recipe"]["data"].pop("test") and result.pop("seconds")
    assert results["digits"] == results["noise"]
    assert same(*(weights(tmp_path / name / "run" / "model.safetensors") for name in results))


def test_a_network_without_a_stamp(tmp_path: Path, gain: Any) -> None:
    gain(-1.0)
    recipe = load_recipe(write_recipe(tmp_path, purify={**LIGHT, "max_drop": 0.9, "when": "always"}))
    result = run(recipe, tmp_path / "run")
    assert result["purify"]["status"] == "accepted" and "obeyed" not in result["purify"]["before"]
    assert not isinstance(nab_defense.load(tmp_path / "run"), DefendedModel)


def test_what_the_judge_sees_of_the_suspects(tmp_path: Path) -> None:
    class Session:
        source, recipe, size = open_source("digits"), load_recipe(write_recipe(tmp_path)), 8

    labels = Session.source.labels
    no = np.zeros(len(labels), bool)
    assert repairs._accused(Session, NABPlan.empty(labels)) is None  # type: ignore[arg-type]
    new, suspect = labels.copy(), labels == 3
    new[np.flatnonzero(suspect)[:100]] = 8
    accused = repairs._accused(Session, NABPlan(labels, new, suspect, ~no, no))  # type: ignore[arg-type]
    rows = np.flatnonzero(suspect)[:100]
    assert accused is not None and accused.labels is not None
    assert len(accused) == 100 and set(accused.labels.tolist()) == {3}
    assert (accused.images[:, 0].numpy() == np.stack([Session.source.pixels(i)[..., 0] for i in rows])).all()
    most = NABPlan(labels, (labels + 1) % 10, ~no, ~no, no)
    drawn = repairs._accused(Session, most)  # type: ignore[arg-type]
    assert drawn is not None and len(drawn) == 500
    clean_label = NABPlan(labels, np.where(np.arange(len(labels)) == np.flatnonzero(suspect)[0], 8, labels), suspect, ~no, no)
    assert clean_label.altered.sum() == 1 and repairs._accused(Session, clean_label) is None  # type: ignore[arg-type]


def test_draw_is_balanced() -> None:
    source = open_source("digits")
    drawn = _draw(source, 105, 0, balanced=True)
    assert len(drawn) == 105 and set(np.bincount(drawn.labels)) == {10, 11}
    assert drawn.ids == _draw(source, 105, 0, balanced=True).ids != _draw(source, 105, 1, balanced=True).ids
    few = source.subset(np.flatnonzero((source.labels < 2) | (np.arange(len(source)) < 30)))
    counts = np.bincount(_draw(few, 60, 0, balanced=True).labels)
    assert counts.sum() == 60 and (counts[2:] == np.bincount(few.labels)[2:]).all() and abs(counts[0] - counts[1]) <= 1
    assert _draw(source, 10**6, 0, balanced=True) is _draw(source, None, 0, balanced=False) is source


def test_trusted_images_without_labels_come_from_any_folder(tmp_path: Path) -> None:
    flat = write_images(tmp_path / "images", classes=1, each=130, mode="L") / "c0"
    stage = {"clean": str(flat), "labelled": False, "method": "distill"}
    session = Session(load_recipe(write_recipe(tmp_path, purify=stage)), tmp_path / "run", resume=False)
    trusted = repairs.trusted_images(session)
    assert trusted is not None and trusted.images.labels is None and len(trusted.images) == 130


def test_read_clean() -> None:
    source = open_source("digits")
    drawn, images = read_clean(source, size=16, limit=20, labelled=True, hflip=0.25, seed=1)
    assert (
        images.labels is not None and images.labels.tolist() == drawn.labels.tolist() and drawn.fingerprint != source.fingerprint
    )
    assert images.images.shape == (20, 1, 16, 16) and (images.hflip, images.pad) == (0.25, 2)
    assert read_clean(source, size=8, limit=20, labelled=False, hflip=0.5, seed=1)[1].labels is None


def test_what_judges_is_no_copy_of_what_is_fitted(caplog: pytest.LogCaptureFixture) -> None:
    source = open_source("digits").subset(np.repeat(np.arange(100), 2))
    drawn, images = read_clean(source, size=8, limit=None, labelled=True, hflip=0.5, seed=0)
    assert len(drawn) == len(images) == 100 and drawn.labels.tolist() == source.labels[::2].tolist()
    assert "100 of 200 images are repeats, and are left out" in caplog.text
    parts = [{image.numpy().tobytes() for image in part.images} for part in images.split(0.2, 0)]
    assert not parts[0] & parts[1]


def test_defaults_are_those_of_purify() -> None:
    stage = PurifyStage(clean="digits")
    assert stage.method == "ibau" and stage.when == "unprotected" and stage.labelled and stage.clean_limit is None
    taken = inspect.signature(purify).parameters
    assert (stage.max_drop, stage.holdout) == (taken["max_drop"].default, taken["holdout"].default)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("purify=ibau", ("purify='ibau': expected keys such as method, clean",)),
        ("purify={method: ibau}", ("key 'purify.clean' is missing",)),
        ("purify.methd=ibau", ("no key 'purify.methd'", "did you mean 'method'?")),
        ("purify.rounds=3", ("no key 'purify.rounds'", "'purify.params.rounds'")),
        ("purify.method=ibua", ("no purifier 'ibua'", "did you mean 'ibau'?")),
        ("purify.params.round=3", ("purifier 'ibau' has no setting 'round'", "did you mean 'rounds'?")),
        ("purify.params.rounds=many", ("purifier 'ibau': rounds must be int, got 'many'",)),
        ("purify.when=sometimes", ("purify.when='sometimes'", "'unprotected', 'always' or 'never'")),
        ("purify.clean_limit=0", ("purify.clean_limit=0", "greater than or equal to 1")),
        ("purify.max_drop=-1", ("purify.max_drop=-1", "greater than or equal to 0")),
        ("purify.holdout=1", ("purify.holdout=1", "less than 1")),
        ("purify.labelled=false", ("purify.method=ibau needs labels", "drop purify.labelled=false")),
        ("purify.clean=nowhere", ("no such folder or data set: nowhere",)),
        ("purify.clean=FOLDER", ("has other classes than the training data", "2 and not 10")),
        ("purify.clean_limit=23", ("purify: 13 clean images are left to fit on", "ibau needs 20")),
        ("purify.clean_limit=12", ("purify: class", "has 1 clean images; each of the 10 needs two")),
        ("model={name: vit_tiny_patch16_224, in_chans: 1, kwargs: {img_size: 8, patch_size: 2, depth: 1}}",
         ("purify: ", "batch normalisation")),
    ],
)  # fmt: skip
def test_mistakes(setting: str, says: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "images", mode="L")
    stage = {"clean": "digits", **({"method": "clp"} if "vit" in setting else {})}
    recipe = write_recipe(tmp_path, **({} if setting.startswith("purify={") else {"purify": stage}))
    mistakes = Mistakes(tmp_path, capsys)
    mistakes.train(recipe, setting.replace("FOLDER", str(images)), says=says)
    assert not (mistakes.out / "stages").exists()  # before anything was trained


def test_grey_images_to_repair_a_color_network_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    color, grey = (write_images(tmp_path / mode, mode=mode) for mode in ("RGB", "L"))
    recipe = write_recipe(tmp_path, data={"source": str(color), "test": None, "limit": None, "mean": None, "std": None})
    model = "model={name: resnet10t, small_stem: true}"
    Mistakes(tmp_path, capsys).train(recipe, model, f"purify.clean={grey}", says=("are grey", "takes 3 channels"))


def test_never_reads_nothing(tmp_path: Path) -> None:
    assert (
        main(["train", str(write_recipe(tmp_path)), "purify={clean: nowhere, when: never}", "--out", str(tmp_path / "run")]) == 3
    )
    assert result_of(tmp_path / "run")["purify"] == {"status": "skipped", "when": "never"}
