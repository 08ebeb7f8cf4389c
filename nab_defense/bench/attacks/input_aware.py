"""Input-aware: a generator draws a trigger for each image, which works on no other [Nguyen and Tran 2020, arXiv:2010.08138]."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacker import Classifier, draws, exact, from_unit, grown, restored, seeded, shrunk, state, to_unit
from .base import Images, Learned, Lesson, attacks, check_covers, check_number, learned_shape

__all__ = ["InputAware"]

BATCH = 64
DONORS = 256  # images whose triggers are kept, for covers
SMALLEST = 1e-3  # keeps the diversity loss finite
ALIKE = 1e-12  # mean square: below it images are the same, and the slope of a root would not be finite


class Generator(nn.Module):
    """Image (N, C, E, E) in [0, 1] -> (N, outputs, E, E) in [0, 1]; one step down, two convolutions there, one step up."""

    def __init__(self, channels: int, outputs: int, width: int = 24) -> None:
        super().__init__()
        self.inward = nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.middle = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        self.outward = nn.Conv2d(width + channels, outputs, 3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        centered = (images - 0.5) * 4
        hidden = F.interpolate(self.middle(self.inward(centered)), size=images.shape[2:], mode="nearest")
        drawn: Tensor = torch.sigmoid(4 * self.outward(torch.cat((hidden, centered), 1)))
        return drawn


def diversity(images: Tensor, drawn: Tensor) -> Tensor:
    """||x - x'|| / ||g(x) - g(x')|| of neighbors in the batch, mean (eq. 7): small where unlike images get unlike triggers."""
    apart, drawn_apart = (
        (batch - batch.roll(1, 0)).square().mean((1, 2, 3)).clamp_min(ALIKE).sqrt() for batch in (images, drawn)
    )
    return (apart / (drawn_apart + SMALLEST)).mean()


def worn(images: Tensor, pattern: Tensor, mask: Tensor) -> Tensor:
    """x (1 - m) + p m (eq. 3)."""
    return images * (1 - mask) + pattern * mask


@attacks.register("input_aware", source="arXiv:2010.08138")
@dataclass(frozen=True)
class InputAware(Learned):
    """x (1 - m(x)) + p(x) m(x), mask m and pattern p drawn by networks from x itself; covers wear those of another image.

    The mask is learned first, to be sparse and to differ between images; then the pattern, together with a classifier that must
    send x with its own trigger to the target and with another's to its own class. In the paper that classifier is the victim;
    here only the generators are kept, and the poisoned data must teach the victim by itself. Images above 32 px get pattern and
    mask enlarged.

    Args:
        density: Share of the image that the mask is to cover, in [0.001, 1]; the paper's is 0.032.
        covers: Images that wear another image's trigger with their own label for each poisoned one, in [0, 20].
        mask_epochs, epochs: Training of the mask and of the pattern, in [1, 1000].
    """

    clean_label: ClassVar[bool] = False
    cover_target: ClassVar[bool] = True

    density: float = 0.032
    covers: float = 1.0
    mask_epochs: int = 2
    epochs: int = 6

    def __post_init__(self) -> None:
        check_number("density", self.density, 0.001, 1)
        check_covers(self.covers)
        check_number("mask_epochs", self.mask_epochs, 1, 1000, whole=True)
        check_number("epochs", self.epochs, 1, 1000, whole=True)

    def learn(self, lesson: Lesson) -> dict[str, Tensor]:
        """Both generators, triggers for covers, and the size they work at."""
        images = to_unit(lesson.images)
        generator = torch.Generator().manual_seed(lesson.seed)
        mask = self._learn_mask(images, lesson, generator)
        pattern = self._learn_pattern(images, mask, lesson, generator)
        donors = images[torch.randperm(len(images), generator=generator)[:DONORS]]
        with torch.no_grad():
            kept = {"donor_patterns": pattern(donors), "donor_masks": mask(donors)}
        return {**state(mask, "mask."), **state(pattern, "pattern."), **kept, "edge": torch.tensor(images.shape[2])}

    def _learn_mask(self, images: Tensor, lesson: Lesson, generator: torch.Generator) -> nn.Module:
        """Minimises 100 * |mean of m(x) - density| + diversity (eq. 9). The paper's first term is one-sided and over the whole
        batch, which leaves some images without a trigger; a victim that is not trained along with the mask needs one on each."""
        mask = lesson.runtime.place(seeded(lambda: Generator(images.shape[1], 1), lesson.seed))
        optimizer = torch.optim.Adam(mask.parameters(), lr=0.01)
        for chosen in draws(len(images), batch=BATCH, epochs=self.mask_epochs, generator=generator):
            batch = lesson.runtime.put(images[chosen])
            drawn = mask(batch)
            loss = 100 * (drawn.mean((1, 2, 3)) - self.density).abs().mean() + diversity(batch, drawn)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return mask.eval().cpu().requires_grad_(False)

    def _learn_pattern(self, images: Tensor, mask: nn.Module, lesson: Lesson, generator: torch.Generator) -> nn.Module:
        """Minimises the classifier's loss on clean, own-trigger and cross-trigger images + diversity (eq. 5, 6, 8)."""
        runtime, labels = lesson.runtime, torch.from_numpy(lesson.labels)
        wanted = (labels + 1) % lesson.num_classes if lesson.target is None else torch.full_like(labels, lesson.target)
        pattern = runtime.place(seeded(lambda: Generator(images.shape[1], images.shape[1]), lesson.seed + 1))
        network = runtime.place(seeded(lambda: Classifier(images.shape[1], lesson.num_classes), lesson.seed + 2))
        runtime.place(mask)
        optimizer = torch.optim.Adam([*pattern.parameters(), *network.parameters()], lr=0.003)
        for chosen in draws(len(images), batch=BATCH, epochs=self.epochs, generator=generator):
            batch = runtime.put(images[chosen])
            drawn, where = pattern(batch), mask(batch)
            # Thirds rather than the paper's tenths: there are fewer steps to learn in.
            own, cross = len(batch) // 3, 2 * len(batch) // 3
            shown = torch.cat((
                worn(batch[:own], drawn[:own], where[:own]),
                worn(batch[own:cross], drawn.roll(1, 0)[own:cross], where.roll(1, 0)[own:cross]),
                batch[cross:],
            ))  # fmt: skip
            truth = torch.cat((wanted[chosen][:own], labels[chosen][own:])).to(batch.device)
            loss = F.cross_entropy(network(shown), truth) + diversity(batch, drawn)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        mask.cpu()
        return pattern.eval().cpu().requires_grad_(False)

    @cached_property
    def networks(self) -> tuple[nn.Module, nn.Module]:
        """Pattern and mask."""
        made = []
        for start in ("pattern.", "mask."):
            weights = self.learned(start)
            channels, outputs = weights["inward.0.weight"].shape[1], len(weights["outward.bias"])
            made.append(restored(partial(Generator, channels, outputs), weights))
        return made[0], made[1]

    def apply(self, images: Images, seed: int) -> Images:
        learned = self.learned()
        _, height, width, _ = learned_shape(images, learned["donor_patterns"].shape[1])
        with exact():
            large = to_unit(images)
            small = shrunk(large, int(learned["edge"]))
            pattern, mask = (grown(network(small), height, width) for network in self.networks)
            return from_unit(worn(large, pattern, mask))

    def cover(self, images: Images, seed: int) -> Images:
        """Wearing the trigger of another image of the data, drawn for each from `seed`."""
        patterns, masks = (self.learned()[name] for name in ("donor_patterns", "donor_masks"))
        count, height, width, _ = learned_shape(images, patterns.shape[1])
        drawn = torch.randint(len(patterns), (count,), generator=torch.Generator().manual_seed(seed))
        with exact():
            return from_unit(worn(to_unit(images), grown(patterns[drawn], height, width), grown(masks[drawn], height, width)))
