"""Every purifier serves a network of every family, or says before it starts that it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from nab_defense.channels import maskable, ranking
from nab_defense.clean import CleanSet, Pixels, logits_of
from nab_defense.kept import Kept
from nab_defense.purify import purifiers
from nab_defense.purify.base import Notes
from nab_defense.purify.run import PATCH, RADIUS
from nab_defense.runtime import Runtime
from nab_defense.universal import Pool, pool_of
from tests.purify.families import FAMILIES, REFUSED, family

CPU = Runtime(device="cpu", precision="float32")
CLEAN = CleanSet(
    torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 2
)
BRIEF = {"steps": 2, "rounds": 1, "batch_size": 12}
METHODS = {
    "ibau": BRIEF,
    "ibau exact": {**BRIEF, "form": "exact"},
    "ibau fd": {**BRIEF, "form": "fd"},
    "polarizer": BRIEF,
    "distill": BRIEF,
    "finetune": BRIEF,
    "ft_sam": BRIEF,
    "clp": {},
    "rnp": BRIEF,
}


def grown(name: str) -> Pixels:
    network = Pixels(family(name, 2), [0.5] * 3, [0.5] * 3).requires_grad_(False).eval()
    for weight in network.parameters():  # a head of zeros would hide what the others do
        weight.add_(0.01 * torch.randn_like(weight))
    return network


@cache
def pool(name: str) -> tuple[Pool, dict[str, Any]]:
    """Made once for all methods, with the state that each of them finds it in."""
    made = pool_of(grown(name), CLEAN, radius=RADIUS, patch=PATCH, runtime=CPU)
    return made, made.state_dict()


def candidates(method: str, name: str, network: Pixels) -> Iterator[tuple[str, nn.Module]]:
    made = purifiers.create(method.partition(" ")[0], **METHODS[method])
    made.check(network, CLEAN.images[:2].float() / 255)
    shared, state = pool(name)
    shared.load_state_dict(state)
    if method == "rnp":  # an untrained network knows nothing that it could forget and recover: only the training after a cut
        ranked = ranking({name: torch.arange(count) / count for name, count in maskable(network).items()})
        return made._tuned(network, ranked[: len(ranked) // 10], CLEAN, shared, CPU, Kept())
    return made.candidates(network, CLEAN, pool=shared, runtime=CPU, notes=Notes(), kept=Kept())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_served_or_refused_at_the_start(method: str, name: str) -> None:
    network = grown(name)
    before = logits_of(network, CLEAN, CPU)
    if (method, name) in REFUSED:
        with pytest.raises(ValueError, match=method.partition(" ")[0]):
            next(candidates(method, name, network))
        return
    made = [logits_of(candidate, CLEAN, CPU) for _, candidate in candidates(method, name, network)]
    assert made and all(torch.isfinite(logits).all() and logits.shape == before.shape for logits in made)
    assert not torch.equal(made[-1], before)
