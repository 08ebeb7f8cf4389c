"""The judge of candidates: what they still know, and how far they can still be turned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...changes import Universal
from ...clean import CleanSet, Pixels, logits_of
from ...ranks import watched
from ...runtime import Runtime
from ...universal import PROBE_BATCH, Pool, pursued, started

__all__ = ["Judge"]

PROBES, PROBE_IMAGES = 6, 250
BATCHES = PROBE_BATCH, PROBE_BATCH // 2  # for perturbations that are made anew, and for those that go on


class Judge:
    """Held-out accuracy, and a proxy of ASR that needs no truth: how far universal perturbations still turn images.

    A backdoor is a change that turns images more easily than others do. So the perturbations are those, six at most, that stand
    out on the original network: as they were made there, after some steps more on the candidate, and made anew on it, patches at
    the place that then promises the most. A network can learn to withstand a few given ones and keep its backdoor. Without
    labels, accuracy is what the original network expects it to be: the mean probability that it gives to the predictions."""

    def __init__(self, network: Pixels, fit: CleanSet, held: CleanSet, pool: Pool, runtime: Runtime) -> None:
        self.original, self.fit, self.held, self.runtime = network, fit, held, runtime
        chances = logits_of(network, held, runtime).softmax(1)
        self.trust = chances if held.labels is None else torch.eye(chances.shape[1])[held.labels]
        self.right = self.trust.gather(1, chances.argmax(1)[:, None])
        self.easiest = [one.copied() for one in pool.suspicious[:PROBES]]  # the method may climb on with its own
        self.order = torch.randperm(len(held), generator=torch.Generator().manual_seed(runtime.seed))  # folders come by class

    def __call__(self, network: nn.Module) -> dict[str, Any]:
        logits = logits_of(network, self.held, self.runtime)
        if not torch.isfinite(logits).all():
            # of no use, and without a slope to climb on
            return {"accuracy": 0.0, "error": 0.0, "n": len(self.held), "proxy": 1.0, "class": 0, "by_class": {}}
        predicted = logits.argmax(1)
        right = self.trust.gather(1, predicted[:, None])
        error = float((right - self.right).std(correction=0)) / len(right) ** 0.5
        probes = list(self.easiest)
        if network is not self.original:
            many, few = (self.fit.endless(n, runtime=self.runtime, seed=self.runtime.seed, augment=False) for n in BATCHES)
            for one in watched(self.easiest, "judging"):
                probes.append(started(network, one, many, self.runtime))
                probes.append(pursued(network, one, few, self.runtime))
        rates = [(self._turned(network, predicted, one), one.wanted) for one in probes]
        worst, label = max(rates, key=lambda rate: rate[0])
        by_class = {str(k): max(rate for rate, wanted in rates if wanted == k) for _, k in rates}
        found = {"accuracy": float(right.mean()), "error": error, "n": len(right)}
        return {**found, "proxy": worst, "class": label, "by_class": by_class}

    def _turned(self, network: nn.Module, plain: Tensor, one: Universal) -> float:
        """Share of held-out images that the perturbation turns to its class, of a random few of those not given it anyway."""
        others = self.order[(plain != one.wanted)[self.order]][:PROBE_IMAGES].sort().values
        if not len(others):
            return 1.0  # a network that names everything alike is turned already
        turned = logits_of(network, self.held.take(others), self.runtime, one.painted).argmax(1)
        return float((turned == one.wanted).float().mean())
