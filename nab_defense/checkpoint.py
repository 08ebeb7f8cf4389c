"""Build a network, and save and load a whole model: weights, stamp, normalisation, classes, in one safetensors file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from . import io
from .defended import DefendedModel
from .purify.polarizer import describe, install
from .registry import nearest
from .stamp import Stamp

__all__ = [
    "Network", "build_function", "count_classes", "find_header", "fit_weights", "load", "read_header", "save", "sized",
    "weights_file",
]  # fmt: skip

FORMAT = "nab_defense 1"
PREFIXES = ("module.", "_orig_mod.", "model.")  # left by DataParallel, torch.compile and wrappers
OTHERWISE = "; if it was built otherwise, give its --num-classes and --input-size, or --model package.module:function"


@dataclass(frozen=True)
class Network:
    """How to build a network.

    Args:
        model: timm name; or "package.module:function", which `load` is then given as a function, since a file must not say what
            code to run.
        num_classes, in_chans: Outputs and input channels.
        small_stem: Replace the stem of a ResNet by one 3x3 convolution without stride and pooling, for small images.
        pretrained: Start from timm's weights.
        kwargs: Passed on to timm's create_model.
    """

    model: str
    num_classes: int
    in_chans: int = 3
    small_stem: bool = False
    pretrained: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def told(cls, header: Mapping[str, Any]) -> Network:
        """As a saved model tells it. Nothing is fetched, and no other file is read that it names: by `checkpoint_path` older
        versions of timm unpickle one."""
        network = header["network"]
        kwargs = {name: value for name, value in network["kwargs"].items() if name != "checkpoint_path"}
        return cls(**{**network, "pretrained": False, "kwargs": kwargs})

    def build(self) -> nn.Module:
        """A fresh network; its weights follow from torch's global seed.

        Raises:
            ValueError: timm does not know it, does not take its settings, or cannot fetch its weights."""
        self.check_name()
        try:
            network: nn.Module = timm.create_model(
                self.model, pretrained=self.pretrained, num_classes=self.num_classes, in_chans=self.in_chans, **self.kwargs
            )
        except Exception as error:  # model constructors and hub downloads raise anything
            raise ValueError(f"timm cannot build {self.model!r}: {' '.join(str(error).split())[:300]}") from error
        if self.small_stem:
            _shrink_stem(network, self.model, self.in_chans)
        return network

    def check_name(self) -> None:
        """Raises: ValueError: timm does not know the model."""
        if ":" in self.model:
            raise ValueError(f"timm has no model {self.model!r}; give the function that builds it as `model`")
        if self.model not in timm.list_models() and not timm.is_model(self.model):
            raise ValueError(f"timm has no model {self.model!r}{nearest(self.model, timm.list_models())}")


def _shrink_stem(network: nn.Module, name: str, in_chans: int) -> None:
    stem = getattr(network, "conv1", None)
    if stem is None or not hasattr(network, "maxpool"):
        raise ValueError(f"small_stem serves timm's ResNet family, not {name!r}; unset it or choose another model")
    width = [m.out_channels for m in stem.modules() if isinstance(m, nn.Conv2d)][-1]
    network.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()


def build_function(name: str) -> nn.Module:
    """The network that "package.module:function" gives; the package may lie in the current folder.

    Raises:
        ValueError: It cannot be imported or called, or gives something else."""
    module, _, function = name.partition(":")
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        made = getattr(import_module(module), function)()
    except Exception as error:  # the user's own code raises anything
        raise ValueError(f"{name!r} gives no network: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    finally:
        sys.path.remove(here)
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name!r} gives {type(made).__name__}, expected a torch.nn.Module")
    return made


def count_classes(model: str, tensors: Mapping[str, Tensor]) -> int:
    """Outputs of a timm network with these weights: rows of its classifier, or timm's default where there is none."""
    config = timm.get_pretrained_cfg(model)
    heads = getattr(config, "classifier", None) or ()  # two of them, where a network was distilled
    last = f".{heads if isinstance(heads, str) else next(iter(heads), '')}.weight"
    rows = [len(tensor) for name, tensor in tensors.items() if f".{name}".endswith(last)]
    return rows[0] if rows else config.num_classes if config is not None else 1000


def sized(model: str, size: int | None) -> dict[str, Any]:
    """What timm's constructor is told of the input's edge in pixels, where weights hang on it, as position embeddings do."""
    config: Any = timm.get_pretrained_cfg(model)
    fixed = config is not None and config.fixed_input_size and size not in (None, config.input_size[-1])
    return {"img_size": size} if fixed else {}


def fit_weights(network: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Load weights that another program saved, less the prefixes that wrappers put before their names, and less what the
    wrappers keep beside them.

    Args: origin: the file, for messages.

    Raises:
        ValueError: Names a few of the weights that are missing, left over, or of another shape."""
    own, state = network.state_dict(), dict(tensors)
    trials = [state]
    while prefix := next((p for p in PREFIXES if any(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        trials.append(state)
    state = min(trials, key=lambda trial: len(trial.keys() ^ own.keys()))
    for name in own:
        if name in state and own[name].shape != state[name].shape:
            ours, theirs = tuple(own[name].shape), tuple(state[name].shape)
            inputs = len(ours) == len(theirs) == 4 and ours[::2] == theirs[::2] and 3 in (ours[1], theirs[1])
            hint = "; images have as many channels as mean and std have values" if inputs else OTHERWISE
            raise ValueError(f"{origin} does not fit the network: {name} is {theirs} in the file, {ours} in the network{hint}")
    missing, unexpected = network.load_state_dict(state, strict=False)
    problems = [f"{kind} {', '.join(sorted(names)[:3])} ({len(names)} in all)" for kind, names in
                (("lacks", missing), ("has unknown", unexpected)) if names]  # fmt: skip
    if problems:
        raise ValueError(f"{origin} does not fit the network: it {' and '.join(problems)}{OTHERWISE}")


def save(path: Path, model: nn.Module, network: Network, *, mean: Sequence[float], std: Sequence[float], **header: Any) -> None:
    """Write a model: a DefendedModel with its stamp, any other network without; either with the polarizer it carries.

    Args:
        path: File to write.
        model: The trained model.
        network: How it was built.
        mean, std: Normalisation of its input.
        header: More JSON-able facts: classes, input_size, verdict.
    """
    stamp = model.stamp.to_dict() if isinstance(model, DefendedModel) else None
    inner = model.model if isinstance(model, DefendedModel) else model
    meta = {"format": FORMAT, "network": asdict(network), "stamp": stamp, "mean": list(mean), "std": list(std), **header}
    polarizer = describe(inner)
    if polarizer is not None:
        meta["polarizer"] = polarizer
    io.save_tensors(path, dict(inner.state_dict()), meta)


def read_header(path: Path) -> dict[str, Any]:
    """Everything in a saved model but its weights."""
    return _open(path)[1]


def find_header(path: Path) -> dict[str, Any] | None:
    """The same, or None where another program wrote the file."""
    if path.is_dir():
        return read_header(path)
    header = io.load_tensors(path)[1] if path.suffix == ".safetensors" else {}
    return header if header.get("format") == FORMAT else None


def load(path: str | Path, model: Callable[[], nn.Module] | None = None) -> nn.Module:
    """A saved result as one module in eval mode: normalised images (B, C, H, W) -> logits (B, K), stamp and polarizer included.

    Args:
        path: A run's folder or its model.safetensors.
        model: Builds the network where timm cannot.

    Raises:
        ValueError: No such file, another format, or weights that do not fit the network.
    """
    tensors, meta = _open(Path(path))
    network = model() if model is not None else Network.told(meta).build()
    try:
        if "polarizer" in meta:
            install(network, **meta["polarizer"])
        network.load_state_dict(tensors)
    except (AttributeError, RuntimeError) as error:  # no such layer, or other shapes
        raise ValueError(
            f"the weights in {path} do not fit {meta['network']['model']!r}: {' '.join(str(error).split())[:300]}"
        ) from error
    if meta["stamp"] is None:
        return network.eval()
    return DefendedModel(network, Stamp(**meta["stamp"]), mean=meta["mean"], std=meta["std"]).eval()


def weights_file(path: Path) -> Path:
    """The file itself, where `path` may be a run's folder."""
    return path / "model.safetensors" if path.is_dir() else path


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    file = weights_file(path)
    tensors, meta = io.load_tensors(file)
    if meta.get("format") != FORMAT:
        raise ValueError(f"{file} was not saved by this package (format {meta.get('format')!r})")
    return tensors, meta
