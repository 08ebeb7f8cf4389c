"""Build a network, and save and load a whole model: weights, stamp, normalisation, classes, in one safetensors file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
from torch import nn

from . import io
from .defended import DefendedModel
from .registry import nearest
from .stamp import Stamp

__all__ = ["Network", "load", "read_header", "save"]

FORMAT = "nab_defense 1"


@dataclass(frozen=True)
class Network:
    """How to build a network.

    Args:
        model: timm name.
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

    def build(self) -> nn.Module:
        """A fresh network; its weights follow from torch's global seed.

        Raises:
            ValueError: timm does not know it, does not take its settings, or cannot fetch its weights."""
        if self.model not in timm.list_models() and not timm.is_model(self.model):
            raise ValueError(f"timm has no model {self.model!r}{nearest(self.model, timm.list_models())}")
        try:
            network: nn.Module = timm.create_model(
                self.model, pretrained=self.pretrained, num_classes=self.num_classes, in_chans=self.in_chans, **self.kwargs
            )
        except Exception as error:  # model constructors and hub downloads raise anything
            raise ValueError(f"timm cannot build {self.model!r}: {' '.join(str(error).split())[:300]}") from error
        if self.small_stem:
            _shrink_stem(network, self.model, self.in_chans)
        return network


def _shrink_stem(network: nn.Module, name: str, in_chans: int) -> None:
    stem = getattr(network, "conv1", None)
    if stem is None or not hasattr(network, "maxpool"):
        raise ValueError(f"small_stem serves timm's ResNet family, not {name!r}; unset it or choose another model")
    width = [m.out_channels for m in stem.modules() if isinstance(m, nn.Conv2d)][-1]
    network.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()


def save(path: Path, model: nn.Module, network: Network, *, mean: Sequence[float], std: Sequence[float], **header: Any) -> None:
    """Write a model: a DefendedModel with its stamp, any other network without.

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
    io.save_tensors(path, dict(inner.state_dict()), meta)


def read_header(path: Path) -> dict[str, Any]:
    """Everything in a saved model but its weights."""
    return _open(path)[1]


def load(path: str | Path, model: Callable[[], nn.Module] | None = None) -> nn.Module:
    """A saved result as one module in eval mode: normalised images (B, C, H, W) -> logits (B, K), stamp included.

    Args:
        path: A run's folder or its model.safetensors.
        model: Builds the network where timm cannot.

    Raises:
        ValueError: No such file, another format, or weights that do not fit the network.
    """
    tensors, meta = _open(Path(path))
    network = model() if model is not None else Network(**{**meta["network"], "pretrained": False}).build()
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {path} do not fit {meta['network']['model']!r}: {' '.join(str(error).split())[:300]}"
        ) from error
    if meta["stamp"] is None:
        return network.eval()
    return DefendedModel(network, Stamp(**meta["stamp"]), mean=meta["mean"], std=meta["std"]).eval()


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    file = path / "model.safetensors" if path.is_dir() else path
    tensors, meta = io.load_tensors(file)
    if meta.get("format") != FORMAT:
        raise ValueError(f"{file} was not saved by this package (format {meta.get('format')!r})")
    return tensors, meta
