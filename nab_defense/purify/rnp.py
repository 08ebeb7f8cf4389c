"""RNP: forget clean images, win them back by channel masks alone, prune what they mask [Li et al. 2023, arXiv:2305.14876]."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..channels import Channel, Masks, maskable, masked, prune, ranking
from ..clean import EVAL_BATCH, CleanSet, Pixels, logits_of
from ..kept import Kept
from ..runtime import Runtime
from ..universal import Pool
from .base import (
    Attacked,
    Candidates,
    Notes,
    check_finite,
    frozen,
    hardened,
    in_range,
    missed,
    purifiers,
    rate_for,
    recentred,
    stepped,
    train_norms,
)

__all__ = ["RNP", "likely_target", "suspicion"]

log = logging.getLogger(__name__)
MOMENTUM, CLIP = 0.9, 5.0
WIDER = 2  # batches of forgetting and recovery
ASIDE, MOST_ASIDE = 0.15, 500  # share of the images, and about so many at most: judge when to stop, and how deep to cut
MOST_STEPS = 400  # of unlearning
OVERBOARD = 4.0  # times the loss of a guess: too far gone to be won back
RECOVERED = 0.5  # of the way from a guess to the original accuracy
MAX_CUT = 0.05  # loss of accuracy, beyond which a cut is too deep
LESS = 3  # times as few channels are cut then
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)  # of the channels: few may hold the backdoor, or a quarter
FEWEST = 20  # channels


def likely_target(logits: Tensor) -> tuple[int, float]:
    """The class that an unlearned network gives most often, and its share: what it still knows may be the backdoor [sec. 3.2].

    Args: logits: (N, K) of clean images of all classes."""
    counts = logits.argmax(1).bincount(minlength=logits.shape[1])
    return int(counts.argmax()), float(counts.max() / len(logits))


def suspicion(original: Tensor, unlearned: Tensor, labels: Tensor) -> Tensor:
    """How well a training sample was kept while clean images were forgotten: the less its loss rises, the more suspicious.

    Args: original, unlearned: Logits (N, K) of both networks. labels: (N,) as given.
    Returns: (N,), higher is more suspicious."""
    return F.cross_entropy(original, labels, reduction="none") - F.cross_entropy(unlearned, labels, reduction="none")


@purifiers.register("rnp", source="arXiv:2305.14876")
@dataclass(frozen=True)
class RNP:
    """Prunes the channels that a network, once it has forgotten the clean images, must switch off to know them again.

    Unlike the authors' code, forgetting stops within an epoch, judged on images that are set aside, on a loss that is capped;
    what does not recover is refused; channels are cut by rank, not by a threshold; and normalisations follow the batches from
    clean statistics on (see base.recentred): in a published model that they are far from, clean batches look forgotten before
    the first step. Such cuts cost small networks too much accuracy, so that, beyond the paper, one more candidate is trained
    after its cut, as fine-pruning is (arXiv:1805.12185), but against universal perturbations, as in IBAU: clean images alone
    leave what the cut did not reach. The hint at the target class can be wrong.

    Args:
        lr: Of forgetting, SGD with momentum .9.
        mask_lr: Of the masks, SGD with momentum .9.
        recover_steps: Of the masks, each on another batch of twice `batch_size`.
        share: Of the channels, cut before the training; a third where it does not win accuracy back, and so on; 0: the paper's
            cuts alone.
        steps, rounds, tune_lr, fraction, hold: Of the training, see IBAU.
        batch_size: Images a step.
        augment: Random crops and flips.
    """

    labelled: ClassVar[bool] = True
    least: ClassVar[int] = 100

    lr: float = 0.01
    mask_lr: float = 0.04
    recover_steps: int = 80
    share: float = 0.15
    steps: int = 280
    rounds: int = 1
    tune_lr: float = 0.01
    fraction: float = 0.25
    hold: float = 2.0
    batch_size: int = 64
    augment: bool = True

    def __post_init__(self) -> None:
        in_range(self, "recover_steps", "steps", "rounds", "batch_size", low=1)
        in_range(self, "lr", "mask_lr", "tune_lr", low=0, ends="()")
        in_range(self, "share", low=0, high=1)
        in_range(self, "fraction", low=0, high=1, ends="()")
        in_range(self, "hold", low=0)

    def check(self, network: Pixels, images: Tensor) -> None:
        if sum(maskable(network).values()) < FEWEST:
            raise ValueError("rnp: the network has too few channels to prune: scales of BatchNorm or GroupNorm, hidden units")

    def candidates(
        self, network: Pixels, clean: CleanSet, *, pool: Pool, runtime: Runtime, notes: Notes, kept: Kept
    ) -> Candidates:
        recentred(network, clean, runtime=runtime, augment=False)  # as the forgetful network is asked
        images, aside = clean.split(min(ASIDE, MOST_ASIDE / len(clean)), runtime.seed + 1)
        before = _accuracy(logits_of(network, aside, runtime), aside)
        unlearned = frozen(copy.deepcopy(network))
        unlearned.load_state_dict(kept.once("unlearned", lambda: self.unlearned(network, images, aside, runtime).state_dict()))
        target, share = likely_target(logits_of(unlearned, aside, runtime))
        notes.evidence |= {"likely_target": target, "likely_target_share": share}
        notes.unlearned = copy.deepcopy(unlearned)  # whose statistics the masks' batches will move
        ranked = ranking(kept.once("masks", lambda: self.recovered(unlearned, images, aside, runtime, before)))
        least = before - MAX_CUT
        yield from self._cuts(copy.deepcopy(network), ranked, aside, runtime, least)
        cut = round(self.share * len(ranked))
        while cut:
            tuned: nn.Module = network
            for name, tuned in self._tuned(network, ranked[:cut], clean, pool, runtime, kept):
                yield f"{cut} of {len(ranked)} channels, {name}", tuned
            if _accuracy(logits_of(tuned, aside, runtime), aside) >= least:
                return  # even of images that it trained on a network with too deep a cut knows less
            cut, kept = round(cut / LESS), Kept()

    def unlearned(self, network: Pixels, images: CleanSet, aside: CleanSet, runtime: Runtime) -> Pixels:
        """A copy that has forgotten `images` [step 1]: ascent on their loss until it knows no more of `aside` than a guess does.

        Both by the statistics of each batch and in eval mode, which is how it is asked for the target class and to rank images.

        Raises: ValueError: It did not forget, or had nothing to forget."""
        copied = copy.deepcopy(network).requires_grad_(True)
        at_rest, by_batch = logits_of(copied, aside, runtime), _logits(copied, aside, runtime)
        guess, lr = math.log(at_rest.shape[1]), self.lr
        if _loss(by_batch, aside) >= guess and _accuracy(by_batch, aside) <= _floor(by_batch, aside):
            raise ValueError("rnp: by the statistics of clean batches the network knows no more than a guess: nothing to forget")
        optimizer = torch.optim.SGD(copied.parameters(), lr=lr, momentum=MOMENTUM)
        for step, losses in zip(stepped(MOST_STEPS, "rnp, forget"), self._losses(copied, images, runtime), strict=False):
            kept = copy.deepcopy(copied.state_dict())
            optimizer.zero_grad()
            (-losses.clamp(max=2 * guess).mean()).backward()
            nn.utils.clip_grad_norm_(copied.parameters(), CLIP)
            optimizer.step()
            logits = _logits(copied, aside, runtime)
            if not _loss(logits, aside) < OVERBOARD * guess:
                lr /= 2
                copied.load_state_dict(kept)
                optimizer = torch.optim.SGD(copied.parameters(), lr=lr, momentum=MOMENTUM)
            elif _forgotten(logits, by_batch, aside) and _forgotten(logits_of(copied, aside, runtime), at_rest, aside):
                risen, left = _loss(logits, aside), _accuracy(logits, aside)
                log.info("rnp: forgotten in %d steps, loss %.2f, accuracy %.3f", step, risen, left)
                return frozen(copied)
            train_norms(copied)
        raise ValueError(f"rnp: the network did not forget the clean images in {MOST_STEPS} steps of lr={self.lr}; change lr")

    def recovered(self, unlearned: Pixels, images: CleanSet, aside: CleanSet, runtime: Runtime, before: float) -> Masks:
        """Masks in [0, 1] under which the unlearned network, its weights fixed, knows the images again [step 2].

        Args: before: Accuracy of the original network on `aside`.
        Raises: ValueError: It stays nearer to a guess; what the masks say then is noise."""
        counts, device = maskable(unlearned), runtime.torch_device
        masks = {name: torch.ones(count, device=device, requires_grad=True) for name, count in counts.items()}
        optimizer = torch.optim.SGD(masks.values(), lr=self.mask_lr, momentum=MOMENTUM)
        train_norms(unlearned)
        every = self._losses(partial(masked, unlearned, masks), images, runtime)
        for _, losses in zip(stepped(self.recover_steps, "rnp, recover"), every, strict=False):
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            for mask in masks.values():
                mask.detach().clamp_(0, 1)
        accuracy = _accuracy(_logits(unlearned, aside, runtime, masks), aside)
        log.info("rnp: recovered to accuracy %.3f of %.3f", accuracy, before)
        guess = float(aside.labels.bincount().max()) / len(aside)  # type: ignore[union-attr]
        if accuracy < guess + RECOVERED * (before - guess):
            raise ValueError(
                f"rnp: recovery failed, accuracy {accuracy:.2f} of {before:.2f} after {self.recover_steps} steps, so that its"
                " masks mean nothing; raise recover_steps, lower lr, or give more clean images"
            )
        return {name: mask.detach() for name, mask in masks.items()}

    def _losses(self, network: Callable[[Tensor], Tensor], images: CleanSet, runtime: Runtime) -> Iterator[Tensor]:
        """Without end, the losses (B,) of the network's logits, all finite."""
        assert images.labels is not None
        batches = images.endless(WIDER * self.batch_size, runtime=runtime, seed=runtime.seed, augment=self.augment)
        for step, (batch, rows) in enumerate(batches, 1):
            with runtime.autocast():
                losses = F.cross_entropy(network(batch), images.labels[rows].to(batch.device), reduction="none")
            check_finite(losses.mean(), "rnp", step)
            yield losses

    def _cuts(self, network: Pixels, ranked: list[Channel], aside: CleanSet, runtime: Runtime, least: float) -> Candidates:
        """The original network without its lowest channels [step 3], while it is still good for something."""
        for cut in _depths(ranked):
            prune(network, ranked[:cut])
            if _accuracy(logits_of(network, aside, runtime), aside) < least:
                return
            yield f"{cut} of {len(ranked)} channels", network

    def _tuned(
        self, teacher: Pixels, gone: list[Channel], clean: CleanSet, pool: Pool, runtime: Runtime, kept: Kept
    ) -> Candidates:
        """Copies of the original that are trained against universal perturbations, during which the channels stay cut."""
        assert clean.labels is not None
        truths, network = clean.labels, copy.deepcopy(teacher)
        recentred(network, clean, runtime=runtime, augment=self.augment)
        params = list(network.requires_grad_(True).parameters())
        optimizer = torch.optim.SGD(params, lr=rate_for(self.tune_lr, clean), momentum=MOMENTUM)

        def slope(batch: Attacked) -> None:
            prune(network, gone)
            train_norms(network)
            loss = missed(network, batch, truths, self.hold, runtime)
            check_finite(loss, "rnp", batch.step)
            loss.backward()
            nn.utils.clip_grad_norm_(params, CLIP)

        for name, tuned in hardened(self, network, teacher, clean, optimizer, slope, pool=pool, runtime=runtime, kept=kept):
            prune(network, gone)
            yield name, tuned


def _depths(ranked: list[Channel]) -> list[int]:
    """How many channels to cut, one after another."""
    return sorted({max(1, round(share * len(ranked))) for share in SHARES})


def _forgotten(logits: Tensor, before: Tensor, clean: CleanSet) -> bool:
    """Whether loss or accuracy became a guess's: half of the way from there to what was known before, at the least."""
    guess, risen = math.log(logits.shape[1]), _loss(logits, clean)
    less = risen >= max(guess, _loss(before, clean) + guess / 2) or _accuracy(logits, clean) <= _floor(before, clean)
    return math.isfinite(risen) and less


def _floor(before: Tensor, clean: CleanSet) -> float:
    """Accuracy near a guess's, and at most half of the way from there to what was known before."""
    count = before.shape[1]
    return min(max(0.2, 2 / count), (1 / count + _accuracy(before, clean)) / 2)


def _loss(logits: Tensor, clean: CleanSet) -> float:
    assert clean.labels is not None
    return float(F.cross_entropy(logits, clean.labels))


def _accuracy(logits: Tensor, clean: CleanSet) -> float:
    assert clean.labels is not None
    return float((logits.argmax(1) == clean.labels).float().mean())


@torch.no_grad()
def _logits(network: nn.Module, clean: CleanSet, runtime: Runtime, masks: Masks | None = None) -> Tensor:
    """(N, K) on the CPU, by the statistics of each batch."""
    train_norms(network)
    found = []
    for images, _ in clean.batches(EVAL_BATCH, runtime=runtime):
        with runtime.autocast():
            found.append(masked(network, masks or {}, images).float().cpu())
    return torch.cat(found)
