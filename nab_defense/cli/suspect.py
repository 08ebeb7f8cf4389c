"""The model that a command is to repair: from a checkpoint of any program, with what must be known to run it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import io
from ..checkpoint import Network, build_function, count_classes, find_header, fit_weights, load, read_header, sized
from ..clean import Pixels
from ..purify.base import count_outputs
from ..runtime import Runtime

__all__ = ["Suspect", "add_arguments", "builder", "open_suspect"]

FACTS = {"num_classes": "--num-classes", "mean": "--mean", "std": "--std", "input_size": "--input-size"}


@dataclass(frozen=True, eq=False)
class Suspect:
    """A model and how to feed it.

    Args:
        model: Takes normalised images; with its stamp, where it has one.
        network: How its network is built.
        mean, std: Normalisation, in [0, 1] units, a value a channel.
        input_size: Edge in pixels.
        classes: Their names, where the file has them.
        key: Where in the file the weights were, "" at the top.
    """

    model: nn.Module
    network: Network
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: int
    classes: tuple[str, ...] | None = None
    key: str = ""

    def header(self) -> dict[str, Any]:
        """As a saved model tells it."""
        facts = {"network": asdict(self.network), "classes": self.classes, "input_size": self.input_size}
        return {**facts, "mean": self.mean, "std": self.std}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="how the network is built: a timm name, package.module:function, or a model saved by this package that is alike; "
        "not needed for a checkpoint of this package",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE", help="safetensors, or what torch.save wrote; or a run's folder"
    )
    parser.add_argument("--num-classes", type=int, metavar="K", help="default: what the checkpoint says")
    parser.add_argument("--mean", type=numbers, metavar="M,M,M", help="normalisation of the input; default timm's for the model")
    parser.add_argument("--std", type=numbers, metavar="S,S,S", help="with --mean 0,0,0 --std 1,1,1 it takes raw [0, 1] pixels")
    parser.add_argument("--input-size", type=int, metavar="PIXELS", help="edge of its input; default timm's for the model")


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def builder(name: str | None) -> Callable[[], nn.Module] | None:
    """What builds "package.module:function"; None for any other name."""
    return partial(build_function, name) if name is not None and ":" in name else None


def open_suspect(
    name: str | None,
    path: Path,
    *,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | None = None,
    runtime: Runtime,
) -> Suspect:
    """Build the network and load the weights.

    Args:
        name: How the network is built, see add_arguments.
        path: The checkpoint.
        num_classes, mean, std, input_size: What the user says about it.
        runtime: Where to run it once, to see that it works.

    Raises:
        ValueError: The two do not fit, or something that must be known is not said."""
    given = {"num_classes": num_classes, "mean": mean, "std": std, "input_size": input_size}
    given = {fact: value for fact, value in given.items() if value is not None}
    header = find_header(path)
    suspect = _foreign(name, path, given) if header is None else _ours(name, path, header, given)
    if suspect.input_size < 1:
        raise ValueError(f"--input-size must be at least 1, got {suspect.input_size}")
    pixels = runtime.place(Pixels(suspect.model, suspect.mean, suspect.std))
    blank = torch.zeros(2, len(suspect.mean), suspect.input_size, suspect.input_size, dtype=torch.uint8)
    outputs = count_outputs(pixels, blank, runtime)  # type: ignore[arg-type]
    if num_classes not in (None, outputs):
        raise ValueError(f"--num-classes says {num_classes}, the model gives {outputs}")
    return replace(suspect, network=replace(suspect.network, num_classes=outputs, in_chans=len(suspect.mean)))


def _foreign(name: str | None, path: Path, given: dict[str, Any]) -> Suspect:
    tensors, key = io.load_weights(path)
    alike: dict[str, Any] = {}
    if name is None:
        raise ValueError(f"{path} does not say how its network is built; add --model")
    if ":" in name:
        network, model = Network(name, 0), build_function(name)
    else:
        if name.endswith(".safetensors") or (Path(name) / "model.safetensors").exists():
            alike = read_header(Path(name))
            network = Network.told(alike)
        else:
            classes = given.get("num_classes") or count_classes(name, tensors)
            network = Network(name, classes, len(given.get("mean", "RGB")), kwargs=sized(name, given.get("input_size")))
        model = network.build()
    fit_weights(model, tensors, str(path))
    _check_normalization(path, tensors, model, given)
    return Suspect(model, network, **_facts(model, alike, given), key=key)


def _check_normalization(path: Path, tensors: dict[str, Tensor], model: nn.Module, given: dict[str, Any]) -> None:
    """Refuse to leave out a normalisation that the file keeps beside the weights, unless the user says what it is."""
    own = tuple(model.state_dict())
    rests = {name: tensor for name, tensor in tensors.items() if not name.endswith(own)}
    for fact, names in (("mean", ("mean", "mu")), ("std", ("std", "sigma"))):
        found = next((name for name in rests if name.rpartition(".")[2] in names and rests[name].numel() in (1, 3)), None)
        if found is not None and fact not in given:
            values = ",".join(f"{value:.4g}" for value in rests[found].flatten().tolist())
            raise ValueError(f"{path} holds {found}, by which its network normalises its input: add {FACTS[fact]} {values}")


def _ours(name: str | None, path: Path, header: dict[str, Any], given: dict[str, Any]) -> Suspect:
    """A model that this package saved, which knows everything itself."""
    network = Network.told(header)
    known = {**header, "num_classes": network.num_classes, "mean": tuple(header["mean"]), "std": tuple(header["std"])}
    for fact, value in given.items():
        if known.get(fact, value) != value:
            raise ValueError(f"{path} says {fact} = {known[fact]}; leave out {FACTS[fact]}")
    if name not in (None, network.model) and builder(name) is None:
        raise ValueError(f"{path} was saved with model {network.model!r}; leave out --model")
    model = load(path, builder(name))
    return Suspect(model, network, **_facts(model, known, given))


def _facts(model: nn.Module, alike: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """mean, std, input_size and classes: as given, as of a like model, as in timm's configuration."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    if "input_size" in config:
        config = {**config, "input_size": config["input_size"][-1]}
    facts: dict[str, Any] = {**config, **alike, **given}
    for fact in ("mean", "std", "input_size"):
        if facts.get(fact) is None:
            raise ValueError(f"nothing says the {fact} of this network's input; add {FACTS[fact]}")
    classes = None if alike.get("classes") is None else tuple(alike["classes"])
    return {"mean": tuple(facts["mean"]), "std": tuple(facts["std"]), "input_size": int(facts["input_size"]), "classes": classes}
