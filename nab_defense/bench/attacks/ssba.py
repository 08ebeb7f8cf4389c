"""SSBA: a bit string hidden by an image-dependent residual, as steganography does [ISSBA, Li et al. 2021, arXiv:2012.03816]."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacker import Classifier, draws, exact, from_unit, grown, restored, seeded, shifted, shrunk, state, to_unit
from .base import Images, Learned, Lesson, attacks, check_number, learned_shape

__all__ = ["Ssba"]

BATCH = 32


class Encoder(nn.Module):
    """Image (N, C, E, E) in [0, 1] and bits (N, B) in {-1, 1} -> residual of the image's shape, in [-2, 2], of mean 0.

    The bits are flat planes beside the image's, so that without structure in the image there is nothing to add: a residual that
    is the same for all images, the cheap way to hide bits, cannot be expressed."""

    def __init__(self, channels: int, bits: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels + bits, width, 3, padding=1, padding_mode="replicate")
        self.second = nn.Conv2d(width + bits, width, 3, padding=1, padding_mode="replicate")
        self.last = nn.Conv2d(width, channels, 3, padding=1, padding_mode="replicate")

    def forward(self, images: Tensor, bits: Tensor) -> Tensor:
        planes = bits[:, :, None, None].expand(-1, -1, *images.shape[2:])
        hidden = F.relu(self.first(torch.cat(((images - 0.5) * 4, planes), 1)))
        hidden = F.relu(self.second(torch.cat((hidden, planes), 1)))
        residual: Tensor = torch.tanh(self.last(hidden))
        return residual - residual.mean((2, 3), keepdim=True)


@attacks.register("ssba", source="arXiv:2012.03816")
@dataclass(frozen=True)
class Ssba(Learned):
    """image + eps * encoder(image, secret), clipped; one secret bit string for all images.

    Encoder and decoder are trained together on random strings: binary cross-entropy of the decoded bits + weight * mean square of
    the residual. The paper adds a perceptual loss and a critic, and encodes with a large U-net; here eps bounds the residual
    instead, and images above 32 px get it enlarged. With the default epochs, on 12,000 images, the decoder reads .73 and .59 of
    the bits (two seeds; chance is .5): what the attack rests on is a residual that no two images share, more than a message.

    Args:
        eps: Size of the residual in grey levels, in [1, 128]; taking off its mean lets a pixel change by up to twice as much.
        bits: Length of the string, in [1, 64].
        weight: Of the residual's mean square, in [0, 100].
        epochs: Training of encoder and decoder, in [1, 1000].
    """

    clean_label: ClassVar[bool] = False

    eps: float = 24.0
    bits: int = 8
    weight: float = 0.01
    epochs: int = 4

    def __post_init__(self) -> None:
        check_number("eps", self.eps, 1, 128)
        check_number("bits", self.bits, 1, 64, whole=True)
        check_number("weight", self.weight, 0, 100)
        check_number("epochs", self.epochs, 1, 1000, whole=True)

    def learn(self, lesson: Lesson) -> dict[str, Tensor]:
        """The encoder, the secret, and the size they work at."""
        images, runtime = to_unit(lesson.images), lesson.runtime
        channels = images.shape[1]
        encoder = runtime.place(seeded(lambda: Encoder(channels, self.bits, 16), lesson.seed))
        decoder = runtime.place(seeded(lambda: Classifier(channels, self.bits), lesson.seed + 1))
        generator = torch.Generator().manual_seed(lesson.seed)
        steps = self.epochs * max(1, len(images) // BATCH)
        weights = [*encoder.parameters(), *decoder.parameters()]
        optimizer = torch.optim.Adam(weights, lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps + 1)
        for chosen in draws(len(images), batch=BATCH, epochs=self.epochs, generator=generator):
            bits = torch.randint(2, (len(chosen), self.bits), generator=generator).float().to(runtime.torch_device)
            batch = runtime.put(shifted(images[chosen], generator))
            residual = encoder(batch, 2 * bits - 1)
            decoded = decoder((batch + self.eps / 255 * residual).clamp(0, 1))
            loss = F.binary_cross_entropy_with_logits(decoded, bits) + self.weight * residual.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        secret = torch.randint(2, (1, self.bits), generator=generator).float() * 2 - 1
        # the decoder is kept to check by: it reads the secret from what was triggered
        return {
            **state(encoder, "encoder."),
            **state(decoder, "decoder."),
            "secret": secret,
            "edge": torch.tensor(images.shape[2]),
        }

    @cached_property
    def encoder(self) -> nn.Module:
        weights = self.learned("encoder.")
        width, channels = len(weights["first.bias"]), len(weights["last.bias"])
        return restored(partial(Encoder, channels, self.bits, width), weights)

    def apply(self, images: Images, seed: int) -> Images:
        learned = self.learned()
        count, height, width, _ = learned_shape(images, len(learned["encoder.last.bias"]))
        with exact():
            large = to_unit(images)
            residual = self.encoder(shrunk(large, int(learned["edge"])), learned["secret"].expand(count, -1))
            return from_unit(large + self.eps / 255 * grown(residual, height, width))
