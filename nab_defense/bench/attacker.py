"""What attackers who learn their trigger share: images in and out of networks, and a small classifier to learn against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..runtime import Runtime

__all__ = [
    "Classifier",
    "draws",
    "exact",
    "fit_classifier",
    "from_unit",
    "grown",
    "restored",
    "seeded",
    "shifted",
    "shrunk",
    "state",
    "to_unit",
]

SHIFT = 2  # pixels at 32 px


def to_unit(images: NDArray[np.uint8]) -> Tensor:
    """(N, H, W, C) uint8 -> (N, C, H, W) float32 in [0, 1]."""
    return torch.from_numpy(images.astype(np.float32) / 255).permute(0, 3, 1, 2).contiguous()


def from_unit(images: Tensor) -> NDArray[np.uint8]:
    """(N, C, H, W) in [0, 1], clipped -> (N, H, W, C) uint8."""
    pixels = images.detach().clamp(0, 1).mul(255).round().byte()
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def shrunk(images: Tensor, edge: int) -> Tensor:
    """(N, C, H, W) at edge x edge, where the networks work; the images themselves where they have that size."""
    if images.shape[2:] == (edge, edge):
        return images
    return F.interpolate(images, size=(edge, edge), mode="bilinear", antialias=True)


def grown(images: Tensor, height: int, width: int) -> Tensor:
    """(N, C, E, E) at height x width."""
    return images if images.shape[2:] == (height, width) else F.interpolate(images, size=(height, width), mode="bilinear")


@contextmanager
def exact(*, slopes: bool = False) -> Iterator[None]:
    """Float32 with or without gradients, whatever the caller does: images are painted while a loader runs, which may be inside
    inference mode and autocast, and must come out the same there."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(slopes))
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network with weights drawn from a seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def restored(build: Callable[[], nn.Module], weights: Mapping[str, Tensor]) -> nn.Module:
    """A network with these weights, see state, in eval mode and frozen."""
    network = seeded(build, 0)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def draws(count: int, *, batch: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of shuffled batches for some epochs; an incomplete last batch is left out."""
    size = min(batch, count)
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        for first in range(0, count - size + 1, size):
            yield order[first : first + size]


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """A batch moved by up to 2 pixels (at 32 px), all images alike: cheap augmentation that suits digits too."""
    most = max(1, round(SHIFT * images.shape[2] / 32))
    down, right = torch.randint(-most, most + 1, (2,), generator=generator).tolist()
    return images.roll((down, right), dims=(2, 3))


def state(network: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The weights by name, on the CPU."""
    return {prefix + name: value.detach().cpu() for name, value in network.state_dict().items()}


class Classifier(nn.Module):
    """Four convolutions and a head for images in [0, 1], (N, C, E, E) -> (N, K): 5 million multiplications at 32 px."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        widths, strides = (channels, 16, 32, 64, 128), (1, 2, 2, 2)
        layers: list[nn.Module] = []
        for before, after, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body((images - 0.5) * 4).mean((2, 3)))
        return logits


def fit_classifier(
    images: Tensor, labels: Tensor, *, classes: int, epochs: int, seed: int, runtime: Runtime, batch: int = 64
) -> Classifier:
    """A classifier trained with AdamW under a one-cycle learning rate, in eval mode, its weights frozen.

    Args:
        images: (N, C, E, E) in [0, 1].
        labels: (N,) int64."""
    network = seeded(lambda: Classifier(images.shape[1], classes), seed)
    assert isinstance(network, Classifier)
    runtime.place(network)
    generator = torch.Generator().manual_seed(seed)
    total = epochs * max(1, len(images) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=total + 1)
    for chosen in draws(len(images), batch=batch, epochs=epochs, generator=generator):
        logits = network(runtime.put(shifted(images[chosen], generator)))
        loss = F.cross_entropy(logits, labels[chosen].to(logits.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)
