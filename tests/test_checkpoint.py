"""Weights that other programs saved, networks that timm does not have, and polarizers that travel with their network."""

from __future__ import annotations

import argparse
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from nab_defense import checkpoint, io
from nab_defense.checkpoint import Network, build_function, count_classes, fit_weights
from nab_defense.defended import DefendedModel
from nab_defense.purify.polarizer import describe, install
from nab_defense.sites import last_cut
from nab_defense.stamp import Stamp

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("key", ["", *io.STATE_KEYS])
def test_weights_are_found_under_every_usual_key(key: str, tmp_path: Path) -> None:
    state = small().state_dict()
    beside: dict[str, Any] = {"epoch": 3, "args": argparse.Namespace(lr=0.1, opt="sgd"), "optimizer": {"lr": 0.1}}
    beside |= {"best": np.float64(0.9), "seen": np.int64(7), "half": np.float16(0.5), "done": np.bool_(True)}
    beside["poisoned"] = {"indices": np.arange(5), "shares": np.ones((2, 3), np.float32), "is": np.zeros(4, bool)}
    torch.save(state if key == "" else {key: state, **beside}, tmp_path / "weights.pth")
    found, where = io.load_weights(tmp_path / "weights.pth")
    assert where == key and equal(found, state)


def test_averaged_weights_go_first_as_in_timm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, averaged = small().state_dict(), small().state_dict()
    torch.save({"state_dict": plain, "state_dict_ema": averaged}, tmp_path / "weights.pth")
    found, where = io.load_weights(tmp_path / "weights.pth")
    assert where == "state_dict_ema" and equal(found, averaged) and "averaged weights, 'state_dict_ema', are taken" in caplog.text


def test_weights_of_a_safetensors_file(tmp_path: Path) -> None:
    state = small().state_dict()
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors", metadata={"format": "pt"})
    found, where = io.load_weights(tmp_path / "weights.safetensors")
    assert where == "" and equal(found, state) and checkpoint.find_header(tmp_path / "weights.safetensors") is None


class Surprise:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path, made = tmp_path / "weights.pth", tmp_path / "made"
    torch.save({"state_dict": small().state_dict(), "extra": Surprise(made)}, path)
    with pytest.raises(ValueError, match=r"weights.pth cannot be read as weights: it holds io.open, and only tensors are read"):
        io.load_weights(path)
    path.write_bytes(pickle.dumps(Surprise(made)))
    with pytest.raises(ValueError, match="cannot be read as weights") as caught:
        io.load_weights(path)
    assert "\n" not in str(caught.value) and not made.exists()


def test_files_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(ValueError, match="no such file"):
        io.load_weights(path)
    path.write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="cannot be read as weights: it is broken, or of another kind"):
        io.load_weights(path)
    for tree, says in [({"epoch": 3, "lr": 0.1}, r"holds no state dict \(epoch, lr\)"), ([1, 2], r"no state dict \(list\)")]:
        torch.save(tree, path)
        with pytest.raises(ValueError, match=says):
            io.load_weights(path)
    torch.save(small(), path)
    with pytest.raises(ValueError, match=r"it holds torch.nn.modules.container.Sequential.*save model.state_dict\(\) alone"):
        io.load_weights(path)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "module.model."])
def test_prefixes_of_wrappers_are_stripped(prefix: str) -> None:
    state, network = small().state_dict(), small()
    fit_weights(network, {prefix + name: tensor for name, tensor in state.items()}, "file")
    assert equal(network.state_dict(), state)


@pytest.mark.parametrize("beside", [{"n_averaged": torch.tensor(3)}, {"loss.weight": torch.ones(2)}])
def test_what_a_wrapper_keeps_beside_the_network_is_left_out(beside: dict[str, torch.Tensor]) -> None:
    network, state = small(), small().state_dict()
    fit_weights(network, {**beside, **{f"module.{name}": tensor for name, tensor in state.items()}}, "file")
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    with pytest.raises(ValueError, match="has unknown"):
        fit_weights(network, {**beside, **state}, "file")


def test_a_prefix_of_the_network_itself_stays() -> None:
    network, other = nn.ModuleDict({"model": small()}), nn.ModuleDict({"model": small()})
    fit_weights(network, {f"module.{name}": tensor for name, tensor in other.state_dict().items()}, "file")
    assert equal(network.state_dict(), other.state_dict())


def test_weights_that_do_not_fit_are_named() -> None:
    state = small().state_dict()
    with pytest.raises(ValueError, match=r"file does not fit the network: 0.weight is \(3, 5\) in the file, .*; if it was"):
        fit_weights(small(), {**state, "0.weight": torch.zeros(3, 5)}, "file")
    fewer = {name: tensor for name, tensor in state.items() if not name.startswith("2")}
    with pytest.raises(ValueError, match=r"it lacks 2.bias, 2.weight \(2 in all\); if it was built otherwise"):
        fit_weights(small(), fewer, "file")
    with pytest.raises(ValueError, match=r"it has unknown 3.weight \(1 in all\); if it was built otherwise"):
        fit_weights(small(), {**state, "3.weight": torch.zeros(1)}, "file")
    with pytest.raises(ValueError, match=r"lacks 0.bias, .* \(\d in all\) and has unknown fc.weight"):
        fit_weights(small(), {"fc.weight": torch.zeros(1)}, "file")


def test_the_weights_say_how_many_classes_there_are() -> None:
    state = Network("test_resnet", 7).build().state_dict()
    assert count_classes("test_resnet", state) == 7
    assert count_classes("test_resnet", {f"module.{name}": tensor for name, tensor in state.items()}) == 7
    assert count_classes("test_resnet", {}) == 1000
    heads = {"head.weight": torch.zeros(12, 8), "head_dist.weight": torch.ones(12, 8)}
    assert count_classes("deit_tiny_distilled_patch16_224", heads) == 12


def test_a_function_builds_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\nsmall = lambda: nn.Linear(4, 2)\ndef bad(): raise OSError('no\\nluck')\nthree = lambda: 3\n"
    )
    (tmp_path / "own_broken.py").write_text("def (")
    monkeypatch.chdir(tmp_path)
    assert isinstance(build_function("own_nets:small"), nn.Linear)
    for name, says in {
        "own_nets:smal": "AttributeError: .*smal",
        "own_nets:bad": "'own_nets:bad' gives no network: OSError: no luck",
        "own_nets:three": "'own_nets:three' gives int, expected a torch.nn.Module",
        "own_nothing:x": "ModuleNotFoundError: No module named 'own_nothing'",
        "own_broken:x": "SyntaxError",
    }.items():
        with pytest.raises(ValueError, match=says):
            build_function(name)


def test_a_file_does_not_say_what_code_to_run(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    checkpoint.save(path, small(), Network("nets:small", 2), mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="timm has no model 'nets:small'; give the function that builds it"):
        checkpoint.load(path)
    assert equal(checkpoint.load(path, small).state_dict(), checkpoint.io.load_tensors(path)[0])


def test_a_file_names_no_other_file_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, path = Network("test_resnet", 2, kwargs={"checkpoint_path": "evil.pth", "drop_rate": 0.1}), tmp_path / "m.safetensors"
    checkpoint.save(path, Network("test_resnet", 2).build(), told, mean=MEAN, std=STD)
    asked, create = list[dict[str, Any]](), timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **how: asked.append(how) or create(name, **how))
    checkpoint.load(path)
    assert asked == [{"pretrained": False, "num_classes": 2, "in_chans": 3, "drop_rate": 0.1}]


@pytest.mark.parametrize(("name", "stamped"), [("test_resnet", True), ("test_vit", False)])
def test_a_polarizer_travels_with_its_network(name: str, stamped: bool, tmp_path: Path) -> None:
    how = Network(name, 5, kwargs={"img_size": 32} if name == "test_vit" else {})
    network, images = how.build().eval(), torch.randn(2, 3, 32, 32)
    layer = install(network, **asdict(last_cut(network, images)))
    nn.init.normal_(layer.difference, std=0.3)
    model = DefendedModel(network, Stamp(), mean=MEAN, std=STD) if stamped else network
    checkpoint.save(tmp_path / "m.safetensors", model, how, mean=MEAN, std=STD)
    loaded = checkpoint.load(tmp_path / "m.safetensors")
    assert torch.equal(loaded(images), model(images)) and isinstance(loaded, DefendedModel) is stamped
    assert checkpoint.read_header(tmp_path / "m.safetensors")["polarizer"] == describe(network)


def test_a_polarizer_that_has_no_place(tmp_path: Path) -> None:
    path, how = tmp_path / "m.safetensors", Network("test_resnet", 5)
    checkpoint.save(path, how.build(), how, mean=MEAN, std=STD)
    tensors, meta = io.load_tensors(path)
    assert "polarizer" not in meta
    io.save_tensors(path, tensors, {**meta, "polarizer": {"name": "layer9", "channels": 4, "axis": 1}})
    with pytest.raises(ValueError, match=r"do not fit 'test_resnet'.*layer9"):
        checkpoint.load(path)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x))


def test_tied_weights(tmp_path: Path) -> None:
    model = Tied()
    checkpoint.save(tmp_path / "m.safetensors", model, Network("nets:tied", 3), mean=MEAN, std=STD)
    loaded = checkpoint.load(tmp_path / "m.safetensors", Tied)
    assert torch.equal(loaded(torch.ones(1, 3)), model(torch.ones(1, 3)))


def test_the_network_of_a_recipe_takes_the_keys_that_its_models_were_saved_with() -> None:
    network = build_function("recipes.networks:ibau_cifar10").eval()
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert {"features.0.weight", "features.17.running_var", "classifier.bias"} <= set(network.state_dict())
    assert sum(param.numel() for param in network.parameters()) == 308394
