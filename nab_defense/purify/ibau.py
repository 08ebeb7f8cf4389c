"""I-BAU: unlearn universal perturbations, with or without the implicit gradient [Zeng et al. 2022, arXiv:2110.03735]."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..clean import CleanSet, Pixels
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
    train_norms,
)

__all__ = ["IBAU", "hypergradient"]

Value = Callable[[Tensor], Tensor]
CLIP = 5.0  # of the gradient norm: the inner loss has no floor
FORMS = ("exact", "fd", "none")
FD_STEP = {torch.float32: 1e-2, torch.float64: 1e-5}  # of finite differences, relative to the change


def hypergradient(
    outer: Value, inner: Value, change: Tensor, params: Sequence[Tensor], *, form: str, terms: int, rate: float
) -> tuple[Tensor, list[Tensor]]:
    """Gradient of outer(change*(params), params) where change* minimises `inner` [eq. 3 to 5].

    With H the second derivative of `inner` by the change, and g the gradient of `outer` by it, the fixed point
    v = (I - rate H) v + g is iterated `terms` times; then grad = d outer/d params - rate d2 inner/(d params d change) v.

    Args:
        outer, inner: Losses as functions of the change; both use `params`.
        change: Where to differentiate.
        params: Weights.
        form: "exact" (double backward), "fd" (central finite differences, first-order kernels only), or "none" (direct part).
        terms, rate: Length of the Neumann series and step of the inner problem.

    Returns: the value of outer, and one gradient a weight."""
    implicit = form != "none"
    change = change.detach().requires_grad_(implicit)
    value = outer(change)
    found = torch.autograd.grad(value, [change, *params] if implicit else params, allow_unused=True)
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, found[-len(params) :], strict=True)]
    if not implicit:
        return value.detach(), grads
    push = found[0]
    if form == "exact":
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            (slope,) = torch.autograd.grad(inner(change), change, create_graph=True)

        def curve(vector: Tensor) -> Tensor:
            return torch.autograd.grad(slope, change, vector, retain_graph=True)[0]

        total = vector = push
        for _ in range(terms - 1):
            vector = vector - rate * curve(vector)
            total = total + vector
        mixed = torch.autograd.grad(slope, list(params), total, allow_unused=True)
        pairs = zip(grads, mixed, strict=True)
        return value.detach(), [g if m is None else g - rate * m for g, m in pairs]

    def shifted(vector: Tensor, sign: int, wrt: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        at = (change.detach() + sign * width(vector) * vector).requires_grad_(True)
        return torch.autograd.grad(inner(at), [at] if wrt is None else list(wrt), allow_unused=wrt is not None)

    def width(vector: Tensor) -> Tensor:
        return FD_STEP[change.dtype] * (change.detach().norm() + 1) / vector.norm().clamp_min(1e-12)

    total = vector = push
    for _ in range(terms - 1):
        (up,), (down,) = shifted(vector, 1, None), shifted(vector, -1, None)
        vector = vector - rate * (up - down) / (2 * width(vector))
        total = total + vector
    ups, downs = shifted(total, 1, params), shifted(total, -1, params)
    scale = rate / (2 * width(total))
    triples = zip(grads, ups, downs, strict=True)
    return value.detach(), [g if u is None or d is None else g - scale * (u - d) for g, u, d in triples]


@purifiers.register("ibau", source="arXiv:2110.03735")
@dataclass(frozen=True)
class IBAU:
    """Universal perturbations climb to where they turn images, and the network is trained to withstand them, step by step.

    Unlike the authors' code: a share of every batch carries a perturbation (there 1 image in 100, none in batches under 100);
    each is targeted, since one that merely spoils predictions does not lead to the backdoor's class, and there are several a
    class, spread, a patch, a warp, a wave (see universal.pool_of); radius and share fall with the learning rate: the end belongs
    to accuracy; the curvature comes from fresh batches; normalisations follow the batches, from clean statistics on (see
    base.recentred); and the original's own answers to clean images are held on to, so that few images do.

    Args:
        steps: Updates.
        rounds: Candidates, at equal distances in the second half, the last at the end.
        batch_size: Images a step.
        lr: Of SGD with momentum .9 on the weights, falling to zero along a cosine; with fewer than 256 images to fit on less, in
            proportion to their number.
        fraction: Part of a batch that carries a perturbation, at first, in (0, 1).
        hold: Weight of the divergence from the original's answers, beside the cross-entropy with the labels.
        form, terms, rate: See hypergradient; the default, "none", is what was measured, and takes no terms and no rate.
        augment: Random crops and flips.
    """

    labelled: ClassVar[bool] = True
    least: ClassVar[int] = 20

    steps: int = 280
    rounds: int = 1
    batch_size: int = 64
    lr: float = 0.01
    fraction: float = 0.25
    hold: float = 2.0
    form: str = "none"
    terms: int = 2
    rate: float = 0.1
    augment: bool = True

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")
        in_range(self, "steps", "rounds", "batch_size", "terms", low=1)
        in_range(self, "lr", "rate", low=0, ends="()")
        in_range(self, "fraction", low=0, high=1, ends="()")
        in_range(self, "hold", low=0)

    def check(self, network: Pixels, images: Tensor) -> None:
        """It serves every network that runs; with form=exact, one whose layers have a second derivative."""
        if self.form != "exact":
            return
        change = torch.zeros_like(images[0]).requires_grad_(True)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                (slope,) = torch.autograd.grad(network(images + change).logsumexp(1).sum(), change, create_graph=True)
            torch.autograd.grad(slope.square().sum(), change)
        except RuntimeError as error:
            raise ValueError(f"ibau: form=exact needs a second derivative, and there is none ({error}); use form=fd") from None

    def candidates(
        self, network: Pixels, clean: CleanSet, *, pool: Pool, runtime: Runtime, notes: Notes, kept: Kept
    ) -> Candidates:
        assert clean.labels is not None
        teacher = frozen(copy.deepcopy(network))
        recentred(network, clean, runtime=runtime, augment=self.augment)
        params = list(network.requires_grad_(True).parameters())
        optimizer = torch.optim.SGD(params, lr=rate_for(self.lr, clean), momentum=0.9)
        truths = clean.labels

        def fresh(step: int) -> Tensor:
            seed = (runtime.seed + 1) * 100_003 + step
            return next(clean.batches(max(1, self.batch_size // 2), runtime=runtime, seed=seed, augment=self.augment))[0]

        def slope(batch: Attacked) -> None:
            outer = partial(missed, network, batch, truths, self.hold, runtime)
            inner = partial(_inner, network, batch, fresh(batch.step) if self.form != "none" else batch.images)
            train_norms(network)
            value, grads = hypergradient(outer, inner, batch.one.change, params, form=self.form, terms=self.terms, rate=self.rate)
            check_finite(value, "ibau", batch.step)
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            nn.utils.clip_grad_norm_(params, CLIP)

        yield from hardened(self, network, teacher, clean, optimizer, slope, pool=pool, runtime=runtime, kept=kept)


def _inner(network: Pixels, batch: Attacked, images: Tensor, change: Tensor) -> Tensor:
    """What the perturbation minimises; perturbed images alone must not move the statistics of normalisations."""
    network.eval()
    logits = network(batch.one.painted(images, change))
    goal = torch.full((len(images),), batch.one.wanted, device=images.device)
    return 0.001 * change.square().sum() + F.cross_entropy(logits, goal)
