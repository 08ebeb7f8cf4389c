"""RNP: forget clean images, win them back by channel masks alone, prune what they mask [Li et al. 2023, arXiv:2305.14876]."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..channels import Channel, Masks, maskable, masked, prune, ranking
from ..clean import EVAL_BATCH, CleanSet, Pixels, logits_of
from ..kept import Kept
from ..runtime import Runtime
from ..universal import Pool
from .base import Candidates, Notes, check_finite, divergence, frozen, purifiers, stepped, train_norms

__all__ = ["RNP", "likely_target", "suspicion"]

log = logging.getLogger(__name__)
MOMENTUM, CLIP = 0.9, 5.0
ASIDE = 0.15  # of the images: judge when to stop, and how deep to cut
MOST_STEPS = 400  # of unlearning
OVERBOARD = 4.0  # times the loss of a guess: too far gone to be won back
RECOVERED = 0.5  # of the way from a guess to the original accuracy
MAX_CUT = 0.05  # loss of accuracy, beyond which a cut without fine-tuning is not worth a look
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)  # of the channels: few may hold the backdoor, or a quarter
FEWEST = 20  # channels
HALVINGS = 3  # of the rate of fine-tuning, at most, for one cut


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
    what does not recover is refused; channels are cut by rank, not by a threshold. Pruning alone costs small networks too much
    accuracy, so that a second series of candidates fine-tunes the rest after each cut, as fine-pruning does (arXiv:1805.12185).
    Statistics of normalisations stay: those of clean images wake a cut backdoor. The hint at the target class can be wrong.

    Args:
        lr: Of forgetting, SGD with momentum .9.
        mask_lr: Of the masks, SGD with momentum .9.
        recover_steps: Of the masks, each on another batch.
        tune_lr: Of fine-tuning, Adam, falling to zero along a cosine after each cut; halved where it costs accuracy.
        tune_steps: After each cut; 0: the paper's method.
        hold: Weight of the divergence from the original's answers in fine-tuning, beside the cross-entropy with the labels.
        batch_size: Images a step.
        augment: Random crops and flips.
    """

    labelled: ClassVar[bool] = True
    least: ClassVar[int] = 100

    lr: float = 0.01
    mask_lr: float = 0.04
    recover_steps: int = 80
    tune_lr: float = 3e-3
    tune_steps: int = 60
    hold: float = 1.0
    batch_size: int = 128
    augment: bool = True

    def check(self, network: Pixels, images: Tensor) -> None:
        network(images)
        if sum(maskable(network).values()) < FEWEST:
            raise ValueError("rnp: the network has too few channels to prune: scales of BatchNorm or GroupNorm, hidden units")

    def candidates(
        self, network: Pixels, clean: CleanSet, *, pool: Pool, runtime: Runtime, notes: Notes, kept: Kept
    ) -> Candidates:
        images, aside = clean.split(ASIDE, runtime.seed + 1)
        before = _accuracy(logits_of(network, aside, runtime), aside)
        unlearned = frozen(copy.deepcopy(network))
        unlearned.load_state_dict(
            kept.once("unlearned", lambda: self.unlearned(network, images, aside, runtime, before).state_dict())
        )
        target, share = likely_target(logits_of(unlearned, aside, runtime))
        notes.evidence |= {"likely_target": target, "likely_target_share": share}
        notes.unlearned = copy.deepcopy(unlearned)  # whose statistics the masks' batches will move
        ranked = ranking(kept.once("masks", lambda: self.recovered(unlearned, images, aside, runtime, before)))
        yield from self._cuts(copy.deepcopy(network), ranked, aside, runtime, before - MAX_CUT)
        if self.tune_steps:
            yield from self._tuned_cuts(network, ranked, images, aside, runtime, kept)

    def unlearned(self, network: Pixels, images: CleanSet, aside: CleanSet, runtime: Runtime, before: float) -> Pixels:
        """A copy that has forgotten `images` [step 1]: ascent on their loss until loss or accuracy on `aside` is a guess's.

        Args: before: Accuracy of the original on `aside`; half of the way from there to a guess is the least, of two classes."""
        copied = copy.deepcopy(network).requires_grad_(True)
        count = logits_of(network, aside.take(torch.arange(1)), runtime).shape[1]
        floor, guess, lr = min(max(0.2, 2 / count), (1 / count + before) / 2), math.log(count), self.lr
        optimizer = torch.optim.SGD(copied.parameters(), lr=lr, momentum=MOMENTUM)
        train_norms(copied)
        for step, losses in zip(stepped(MOST_STEPS, "rnp, forget"), self._losses(copied, images, runtime), strict=False):
            kept = copy.deepcopy(copied.state_dict())
            optimizer.zero_grad()
            (-losses.clamp(max=2 * guess).mean()).backward()
            nn.utils.clip_grad_norm_(copied.parameters(), CLIP)
            optimizer.step()
            logits = _logits(copied, aside, runtime)
            risen = float(F.cross_entropy(logits, aside.labels))  # type: ignore[arg-type]
            if not risen < OVERBOARD * guess:
                lr /= 2
                copied.load_state_dict(kept)
                optimizer = torch.optim.SGD(copied.parameters(), lr=lr, momentum=MOMENTUM)
            elif risen >= guess or _accuracy(logits, aside) <= floor:
                log.info("rnp: forgotten in %d steps, loss %.2f, accuracy %.3f", step, risen, _accuracy(logits, aside))
                return frozen(copied)
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

    def _losses(
        self,
        network: Callable[[Tensor], Tensor],
        images: CleanSet,
        runtime: Runtime,
        *,
        teacher: Pixels | None = None,
        done: int = 0,
    ) -> Iterator[Tensor]:
        """Without end, for each batch after the first `done` the losses (B,) of the network's logits, all finite; with what is
        held of the teacher's."""
        assert images.labels is not None
        batches = images.endless(self.batch_size, runtime=runtime, seed=runtime.seed, augment=self.augment)
        for step, (batch, rows) in enumerate(islice(batches, done, None), done + 1):
            with runtime.autocast():
                logits = network(batch)
                losses = F.cross_entropy(logits, images.labels[rows].to(batch.device), reduction="none")
                if teacher is not None:
                    losses = losses + self.hold * divergence(logits, teacher(batch))
            check_finite(losses.mean(), "rnp", step)
            yield losses

    def _cuts(self, network: Pixels, ranked: list[Channel], aside: CleanSet, runtime: Runtime, least: float) -> Candidates:
        """The original network without its lowest channels [step 3], while it is still good for something."""
        for cut in _depths(ranked):
            prune(network, ranked[:cut])
            if _accuracy(logits_of(network, aside, runtime), aside) < least:
                return
            yield f"{cut} of {len(ranked)} channels", network

    def _tuned_cuts(
        self, network: Pixels, ranked: list[Channel], images: CleanSet, aside: CleanSet, runtime: Runtime, kept: Kept
    ) -> Candidates:
        """As before, but with some steps of fine-tuning after each cut; cut channels stay cut.

        A rate at which these steps cost accuracy on `aside` is too high for this network: it is halved, and they are done anew,
        or left out where no rate will do."""
        teacher, optimizer = frozen(copy.deepcopy(network)), torch.optim.Adam(network.parameters())
        state = kept.read("tuned") or {"cut": 0, "rate": self.tune_lr, "batches": 0}
        if state["cut"]:
            network.load_state_dict(state["network"])
            optimizer.load_state_dict(state["optimizer"])
        rate, used = state["rate"], state["batches"]
        every = self._losses(network, images, runtime, teacher=teacher, done=used)
        for cut in _depths(ranked):
            if cut < state["cut"]:
                continue  # offered before
            if cut > state["cut"]:
                prune(network, ranked[:cut])
                saved = copy.deepcopy([network.state_dict(), optimizer.state_dict()])
                least = _accuracy(logits_of(network, aside, runtime), aside) - MAX_CUT
                for _ in range(HALVINGS + 1):
                    self._tuned(network, optimizer, every, ranked[:cut], rate)
                    used += self.tune_steps
                    if _accuracy(logits_of(network, aside, runtime), aside) >= least:
                        break
                    rate /= 2
                    log.info("rnp: fine-tuning cost accuracy, its rate is lowered to %g", rate)
                    network.load_state_dict(saved[0])
                    optimizer.load_state_dict(copy.deepcopy(saved[1]))
                now = {"cut": cut, "rate": rate, "batches": used}
                kept.write("tuned", partial(_with_weights, now, network, optimizer))
            yield f"{cut} of {len(ranked)} channels, tuned", frozen(network)

    def _tuned(
        self, network: Pixels, optimizer: torch.optim.Optimizer, every: Iterator[Tensor], gone: list[Channel], rate: float
    ) -> None:
        """Some steps whose rate falls to zero along a cosine."""
        network.eval().requires_grad_(True)
        for step, losses in zip(stepped(self.tune_steps, "rnp, tune"), every, strict=False):
            optimizer.param_groups[0]["lr"] = rate * (0.5 + 0.5 * math.cos(math.pi * (step - 1) / self.tune_steps))
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            prune(network, gone)


def _depths(ranked: list[Channel]) -> list[int]:
    """How many channels to cut, one after another."""
    return sorted({max(1, round(share * len(ranked))) for share in SHARES})


def _with_weights(state: dict[str, Any], network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {**state, "network": network.state_dict(), "optimizer": optimizer.state_dict()}


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
