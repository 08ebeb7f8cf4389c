"""nab purify: a planted backdoor goes, what is written loads again, and the test images select nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import nab_defense
from nab_defense import checkpoint, io
from nab_defense.checkpoint import Network
from nab_defense.clean import CleanSet
from nab_defense.cli import main
from nab_defense.data import build_transform, open_source
from nab_defense.defended import DefendedModel
from nab_defense.purify.base import Judge
from nab_defense.stamp import Stamp
from tests.digits_runs import write_noise

NETS = "from torch import nn\n\ndef linear():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
OPEN = ["--mean", "0.3", "--std", "0.4", "--input-size", "8"]
QUICK = ["--method", "ibau", "augment=false", "runtime.threads=1"]
STRONG = ["lr=0.1", "hold=1.0", "form=fd", "steps=180", "max_drop=0.1", "rounds=2"]
WEAK = ["steps=1"]
TINY = Network("resnet10t", 10, 1, small_stem=True, kwargs={"stem_width": 8, "channels": [8, 8, 8, 16]})


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def grey(split: str) -> CleanSet:
    """The digits on dark grey: no pixel at the end of its range."""
    digits = CleanSet.read(open_source("digits", split=split).view(build_transform("none", 8)))
    return CleanSet((40 + 0.7 * digits.images.float()).to(torch.uint8), digits.labels)


def inputs(images: Tensor) -> Tensor:
    return (images / 255 - 0.3) / 0.4


def train(model: nn.Module, digits: CleanSet, steps: int) -> None:
    assert digits.labels is not None
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs(digits.images)), digits.labels).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of them: clean/ and test/."""
    folder = tmp_path_factory.mktemp("digits")
    for name, digits, count in (("clean", grey("train"), 600), ("test", grey("test"), 200)):
        assert digits.labels is not None
        for index in range(count):
            path = folder / name / str(int(digits.labels[index])) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits.images[index, 0].numpy()).save(path)
    return folder


@pytest.fixture(scope="module")
def backdoored() -> dict[str, Tensor]:
    """A linear network that knows its digits, and takes a white first pixel for class 3."""
    model = linear()
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    train(model, grey("train"), 100)
    with torch.no_grad():
        model[1].weight[3, 0] += 8.0
        model[1].bias[3] -= 8.0 * (40 / 255 - 0.3) / 0.4
    return dict(model.state_dict())


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    model, digits = TINY.build(), grey("train")
    train(model, digits.take(torch.arange(200)), 10)
    return model.eval()


@pytest.fixture
def place(tmp_path: Path, images: Path, backdoored: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with purify_nets.py, clean/, test/, and bad.pth as another program left it."""
    for name in ("clean", "test"):
        (tmp_path / name).symlink_to(images / name)
    (tmp_path / "purify_nets.py").write_text(NETS)
    torch.save({"net": {f"module.{name}": tensor for name, tensor in backdoored.items()}, "epoch": 3}, tmp_path / "bad.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def foreign(*extra: str) -> int:
    return main(["purify", "--model", "purify_nets:linear", "--checkpoint", "bad.pth", *OPEN, "--clean", "clean", *QUICK, *extra])


def asr(model: nn.Module) -> float:
    digits = grey("test").images.clone()
    digits[:, :, 0, 0] = 255
    return float((model(inputs(digits)).argmax(1) == 3).float().mean())


def measured(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


def test_a_planted_backdoor(place: Path, backdoored: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    assert foreign(*STRONG, "clean_limit=500", "--test", "test", "--out", "out") == 0
    found, before, after = measured(place / "out"), linear(), nab_defense.load("out", linear)
    before.load_state_dict(backdoored)
    assert asr(before) > 0.85 and asr(after) < asr(before) - 0.2
    assert found["status"] == "accepted" and found["chosen"] in [row["name"] for row in found["candidates"]]
    assert found["after"]["proxy"] < found["before"]["proxy"] and found["verdict"]["protected"]
    assert found["before"]["accuracy"] - found["after"]["accuracy"] <= found["max_drop"] == 0.1
    assert found["knobs"]["lr"] == 0.1 and found["knobs"]["hold"] == 1.0 and found["clean_limit"] == 500
    data = found["data"]
    assert data["source"] == "clean" and data["labelled"] and data["n_fit"] + data["n_held"] == 500 and 95 < data["n_held"] < 105
    assert found["model"]["model"] == "purify_nets:linear"
    digest = hashlib.sha256((place / "bad.pth").read_bytes()).hexdigest()
    assert found["checkpoint"] == {"file": "bad.pth", "key": "net", "sha256": digest}
    assert checkpoint.read_header(place / "out")["classes"] == [str(k) for k in range(10)]
    assert set(found["seconds"]) == {"method", "selection"} and found["commit"] is not None and "torch" in found["versions"]
    assert set(found["models"]) == {"original", "purified"} and found["models"]["purified"]["acc"]["value"] > 0.85
    shown = capsys.readouterr().out.splitlines()
    assert next(line for line in shown if line.endswith("<- taken")).startswith(found["chosen"])
    assert found["before"]["class"] == 3  # which is the attack's target
    hint = f"the perturbation that turns most images of the original, {found['before']['proxy']:.2f} of them, turns them to '3'"
    assert f"{hint}: a hint at the attack's target, which can be wrong" in shown
    assert found["verdict"]["text"] in shown and [row["name"] for row in found["candidates"]] == ["step 135", "step 180"]
    assert main(["evaluate", "out", "--model", "purify_nets:linear", "--data", "test"]) == 0
    assert measured(place / "out" / "evaluation")["models"] == {"model": found["models"]["purified"]}


def test_the_test_images_select_nothing(place: Path, lenient: None) -> None:
    write_noise(place / "images")
    attack = ["--attack", "badnets", "attack.size=1", "--target", "3"]
    runs = {"without": [], "digits": ["--test", "test", *attack], "noise": ["--test", "images", *attack]}
    statuses = {foreign("steps=6", "rounds=3", "lr=0.05", *extra, "--out", name) for name, extra in runs.items()}
    found = {name: measured(place / name) for name in runs}
    assert statuses == {0} and found["without"]["models"] == {} and "test" not in found["without"]
    assert found["digits"]["models"]["purified"] != found["noise"]["models"]["purified"]
    for name in runs:
        for record in (found[name], found[name]["after"], *found[name]["candidates"]):
            record.pop("seconds")
        found[name] = {key: value for key, value in found[name].items() if key not in ("models", "test")}
        assert found[name] == found["without"] and len(found[name]["candidates"]) == 3
        (ours, header), (theirs, other) = (io.load_tensors(place / run / "model.safetensors") for run in (name, "without"))
        assert header == other and all(torch.equal(ours[weight], theirs[weight]) for weight in theirs)


def test_rejected(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attack = ["--test", "test", "--attack", "badnets", "attack.size=1", "--target", "3"]
    assert foreign("steps=20", "rounds=2", "lr=30.0", *attack, "--out", "out") == 3
    found = measured(place / "out")
    assert found["status"] == "rejected" and found["chosen"] is None and found["after"] == found["before"]
    assert not found["verdict"]["protected"] and len(found["candidates"]) == 2
    best = max(found["candidates"], key=lambda row: row["accuracy"])
    says = f"even the best candidate, {best['name']}, loses more than max_drop=0.05 of accuracy"
    assert says in found["verdict"]["text"] and says in capsys.readouterr().out
    assert f"to {best['accuracy']:.3f}" in found["verdict"]["text"]
    assert set(found["models"]) == {"original"} and set(found["models"]["original"]) == {"acc", "asr", "ra", "retuned"}
    assert found["test"]["attack"]["params"] == {"size": 1} and [p.name for p in (place / "out").iterdir()] == ["result.json"]


def test_a_method_that_stops_is_no_wrong_input(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert foreign("steps=6", "lr=1e38", "--out", "out") == 3
    found, shown = measured(place / "out"), capsys.readouterr()
    assert found["status"] == "rejected" and found["candidates"] == [] and not found["verdict"]["protected"]
    assert found["stopped"].startswith("ibau: the loss is ") and found["stopped"].endswith("lower lr, or give other clean images")
    assert found["verdict"]["text"] == f"Not repaired, no model written: {found['stopped']}." and not shown.err
    assert found["verdict"]["text"] in shown.out.splitlines() and not (place / "out" / "model.safetensors").exists()


def test_nothing_gained_is_rejected(place: Path) -> None:
    assert foreign(*WEAK, "lr=1e-8", "--out", "out") == 3  # the candidate is the original, nearly
    assert "is turned hardly less" in measured(place / "out")["verdict"]["text"]


def test_what_can_still_be_turned_is_written_but_not_called_repaired(
    place: Path, lenient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nab_defense.purify.base.choice.REPAIRED", 0.0)
    assert foreign(*WEAK, "lr=1e-8", "--out", "out") == 3
    found = measured(place / "out")
    assert found["status"] == "accepted" and not found["verdict"]["protected"] and (place / "out" / "model.safetensors").exists()
    assert found["verdict"]["text"].startswith("Not repaired, though improved, by ibau, step 1: on 120 held-out images")


LIGHT = [*QUICK, "steps=40", "lr=0.1", "max_drop=0.9", "clean_limit=100"]
FACTS: dict[str, Any] = {"mean": (0.3,), "std": (0.4,), "classes": [str(k) for k in range(10)], "input_size": 8}


def test_a_model_of_this_package_says_everything_itself(small: nn.Module, place: Path, lenient: None) -> None:
    model = DefendedModel(small, Stamp(corner="bottom_right"), mean=(0.3,), std=(0.4,))
    checkpoint.save(place / "run" / "model.safetensors", model, TINY, **FACTS)
    assert main(["purify", "--checkpoint", "run", "--clean", "clean", *LIGHT, "--out", "out"]) == 0
    purified, header = nab_defense.load("out"), checkpoint.read_header(place / "out")
    assert isinstance(purified, DefendedModel) and purified.stamp == model.stamp
    assert header["network"] == measured(place / "out")["model"] and header["network"]["small_stem"]
    assert (header["classes"], header["input_size"], header["mean"], header["std"]) == (FACTS["classes"], 8, [0.3], [0.4])
    assert header["purified"]["method"] == "ibau" and header["verdict"]["protected"]
    digest = hashlib.sha256((place / "run" / "model.safetensors").read_bytes()).hexdigest()
    assert measured(place / "out")["checkpoint"] == {"file": "run", "key": "", "sha256": digest}


def test_images_of_something_else_without_labels_or_class_folders(place: Path, lenient: None) -> None:
    generator = torch.Generator().manual_seed(0)
    (place / "other").mkdir()
    for index in range(130):
        shades = 255 * torch.rand(1, 1, 3, 3, generator=generator)
        pixels = F.interpolate(shades, size=16, mode="bilinear")[0, 0].byte()
        Image.fromarray(pixels.numpy()).save(place / "other" / f"{index}.png")
    named = ["--model", "purify_nets:linear", "--checkpoint", "bad.pth", *OPEN, "--method", "distill", "steps=3", "max_drop=0.9"]
    assert main(["purify", *named, "--clean", "other", "--unlabeled", "runtime.threads=1", "--out", "out"]) == 0
    found, purified, before = measured(place / "out"), nab_defense.load("out", linear), linear()
    assert not found["data"]["labelled"] and found["data"]["n_fit"] == 104 and found["data"]["n_held"] == 26
    assert 0 < found["before"]["accuracy"] <= 1  # what the network expects of itself
    before.load_state_dict({name: io.load_weights(place / "bad.pth")[0][f"module.{name}"] for name in before.state_dict()})
    assert not torch.equal(purified.state_dict()["1.weight"], before.state_dict()["1.weight"])


def test_weights_of_a_network_like_a_saved_one(small: nn.Module, place: Path, lenient: None) -> None:
    saved = DefendedModel(TINY.build(), Stamp(), mean=(0.3,), std=(0.4,))
    checkpoint.save(place / "run" / "model.safetensors", saved, TINY, **FACTS)
    torch.save({"model": small.state_dict(), "history": []}, place / "twin.state")
    assert main(["purify", "--model", "run", "--checkpoint", "twin.state", "--clean", "clean", *LIGHT, "--out", "out"]) == 0
    purified = nab_defense.load("out")
    assert not isinstance(purified, DefendedModel)
    candidates = measured(place / "out")["candidates"]
    assert purified.state_dict().keys() == small.state_dict().keys() and len(candidates) == 1


def test_a_killed_run_goes_on_with_resume(
    place: Path, lenient: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["steps=6", "rounds=3", "clean_limit=100"]
    foreign(*how, "--out", "alone")
    judged = Judge.__call__

    def killed(self: Judge, network: nn.Module) -> dict[str, Any]:
        if network is not self.original and (place / "out" / "unfinished" / "judged.state").exists():
            raise KeyboardInterrupt
        return judged(self, network)

    def dark(path: Path, value: Any) -> None:
        raise RuntimeError("the lights go out")

    with monkeypatch.context() as patch:
        patch.setattr(Judge, "__call__", killed)
        capsys.readouterr()
        assert foreign(*how, "--out", "out") == 130
        assert "stopped; the same command goes on with --resume" in capsys.readouterr().err
    assert not (place / "out" / "result.json").exists()
    assert foreign(*how, "lr=0.5", "--out", "out", "--resume") == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "unfinished was left by a run with another model, other images, settings" in line
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the lights go out"):
        patch.setattr(io, "save_json", dark)
        foreign(*how, "--out", "out", "--resume")
    assert (place / "out" / "model.safetensors").exists() and not (place / "out" / "result.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr("nab_defense.cli.purify.evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert foreign(*how, "--test", "test", "--out", "out", "--resume") == 130
    assert measured(place / "out")["models"] == {}
    foreign(*how, "--test", "test", "--out", "out", "--resume")
    assert "purified" in measured(place / "out")["models"]
    alone, out = measured(place / "alone"), measured(place / "out")
    assert len(out["candidates"]) == 3 and not (place / "out" / "unfinished").exists()
    for row in (*alone["candidates"], alone["after"], *out["candidates"], out["after"]):
        row.pop("seconds", None)
    assert (out["candidates"], out["after"], out["chosen"]) == (alone["candidates"], alone["after"], alone["chosen"])
    one, other = (checkpoint.load(place / name, linear).state_dict() for name in ("alone", "out"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
