"""NPD: one linear layer before the last block filters the trigger out [Zhu et al. 2023, arXiv:2306.16697]."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clean import CleanSet, Pixels
from ..kept import Kept
from ..runtime import Runtime
from ..sites import Site, last_cut
from ..universal import Pool
from .base import Attacked, Candidates, Notes, check_finite, frozen, hardened, in_range, missed, purifiers

__all__ = ["Polarized", "Polarizer", "describe", "install"]


class Polarized(nn.Module):
    """A module whose input goes through x + D x + b on the channel axis first; zero D and b change no bit."""

    def __init__(self, module: nn.Module, channels: int, axis: int) -> None:
        super().__init__()
        self.module = module
        self.axis = axis
        self.difference = nn.Parameter(torch.zeros(channels, channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def own(self) -> list[nn.Parameter]:
        """The polarizer's weights."""
        return [self.difference, self.bias]

    def forward(self, stream: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the module is called with beside its stream, such as a mask or positions, goes on to it."""
        if self.axis == -1:
            change = F.linear(stream, self.difference, self.bias)
        else:
            change = F.conv2d(stream, self.difference[..., None, None], self.bias)
        return self.module(stream + change, *args, **kwargs)


def install(network: nn.Module, *, name: str, channels: int, axis: int) -> Polarized:
    """Put an identity polarizer before the module of this name, in place."""
    module = network.get_submodule(name)
    like = next(module.parameters())
    polarized = Polarized(module, channels, axis).to(like.device, like.dtype)
    network.set_submodule(name, polarized)
    return polarized.train(module.training)


def describe(network: nn.Module) -> dict[str, Any] | None:
    """What `install` must be told to rebuild the polarizer that this network carries; None where it has none."""
    for name, module in network.named_modules():
        if isinstance(module, Polarized):
            return asdict(Site(name, len(module.bias), module.axis))
    return None


@purifiers.register("polarizer", source="arXiv:2306.16697")
@dataclass(frozen=True)
class Polarizer:
    """Trains only the polarizer, on clean images and on images that a perturbation pushes toward a wrong class.

    The whole network stays as it is; a polarizer that it carries already is trained on. The layer starts as the identity and sees
    the whole stream: at the published place the skip connection of a residual block leads the trigger around it. The paper
    attacks each image by itself, toward its runner-up class; a trigger is one change that turns all images to its class, and so
    is the attack here, see IBAU. The loss, too, is as there, in place of the paper's four terms.

    Args:
        steps: Updates.
        rounds: Candidates, at equal distances in the second half, the last at the end.
        batch_size: Images a step.
        lr: Of Adam on the layer, falling to zero along a cosine.
        fraction: Part of a batch that carries one, at first, in (0, 1). A layer that meets many gives up more than the trigger:
            at .4 it lost .026 of accuracy on one of the three networks measured, at .12 it lost .008 and left no more.
        hold: Weight of the divergence from the original's answers, beside the cross-entropy with the labels.
        augment: Random crops and flips.
    """

    labelled: ClassVar[bool] = True
    least: ClassVar[int] = 20

    steps: int = 800
    rounds: int = 1
    batch_size: int = 64
    lr: float = 3e-3
    fraction: float = 0.12
    hold: float = 2.0
    augment: bool = True

    def __post_init__(self) -> None:
        in_range(self, "steps", "rounds", "batch_size", low=1)
        in_range(self, "lr", low=0, ends="()")
        in_range(self, "fraction", low=0, high=1, ends="()")
        in_range(self, "hold", low=0)

    def check(self, network: Pixels, images: Tensor) -> None:
        _site(network, images)

    def candidates(
        self, network: Pixels, clean: CleanSet, *, pool: Pool, runtime: Runtime, notes: Notes, kept: Kept
    ) -> Candidates:
        assert clean.labels is not None
        teacher = copy.deepcopy(frozen(network))
        own = _layer(network, runtime.put(clean.images[:2].float() / 255)).own()
        optimizer = torch.optim.Adam([weight.requires_grad_(True) for weight in own], lr=self.lr)
        truths = clean.labels

        def slope(batch: Attacked) -> None:
            loss = missed(network, batch, truths, self.hold, runtime)
            check_finite(loss, "polarizer", batch.step)
            loss.backward()

        yield from hardened(self, network, teacher, clean, optimizer, slope, pool=pool, runtime=runtime, kept=kept)


def _layer(network: Pixels, images: Tensor) -> Polarized:
    """The polarizer that the network carries, or one put in: two in a row are no more than one, and only one is saved."""
    carried = next((module for module in network.modules() if isinstance(module, Polarized)), None)
    return carried or install(network.model, **asdict(_site(network, images)))


def _site(network: Pixels, images: Tensor) -> Site:
    return last_cut(network.model, (images - network.mean) / network.std)
