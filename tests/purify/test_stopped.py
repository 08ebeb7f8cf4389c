"""A method that cannot go on: what it offered until then is judged as ever, and the result says why it ended."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from nab_defense.clean import CleanSet, Pixels
from nab_defense.kept import Kept
from nab_defense.purify import purifiers, purify, run
from nab_defense.purify.base import Candidates, Notes
from nab_defense.repair import in_words
from nab_defense.runtime import Runtime
from nab_defense.universal import Pool
from tests.bars import bars, knows_bars
from tests.purify.test_suspects import CPU, IMAGES, Always, Offers


@dataclass(frozen=True)
class Breaks(Offers):
    """Offers these, and then fails."""

    def candidates(
        self, network: Pixels, clean: CleanSet, *, pool: Pool, runtime: Runtime, notes: Notes, kept: Kept
    ) -> Candidates:
        yield from super().candidates(network, clean, pool=pool, runtime=runtime, notes=notes, kept=kept)
        raise ValueError("x: the loss is nan in step 7")


def judged(network: Any) -> dict[str, Any]:
    """Label 0 is a repair, 1 the original, 2 no better."""
    return {"accuracy": 1.0, "error": 0.0, "n": 20, "proxy": (0.1, 1.0, 1.0)[network.get_submodule("model").label], "class": 2}


@pytest.mark.parametrize(
    ("labels", "status", "says"),
    [
        ((0, 2), "accepted", "Repaired by x, always 0: .* It ended early: x: the loss is nan in step 7.$"),
        ((2,), "rejected", "always 2, is turned hardly less; .* It ended early: x: the loss is nan in step 7.$"),
        ((), "rejected", "^Not repaired, nothing written: x: the loss is nan in step 7.$"),
    ],
)
def test_what_was_offered_before_stands(labels: tuple[int, ...], status: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_pool", lambda *_, **__: None)
    monkeypatch.setattr(run, "Judge", lambda *_: judged)
    original = Always(1)
    found = purify(original, CleanSet(IMAGES), Breaks(labels), mean=(0.5,), std=(0.25,), runtime=CPU)
    assert found.status == status and found.stopped == "x: the loss is nan in step 7"
    assert [row["name"] for row in found.candidates] == [f"always {label}" for label in labels]
    assert found.model.label == 0 if labels[:1] == (0,) else found.model is original
    assert re.search(says, in_words(found, "x", 0.05, instead="nothing written"))


WILD: list[tuple[str, dict[str, Any], str]] = [
    ("ibau", {"lr": 1e38, "steps": 6}, "ibau: the loss is (nan|inf) in step [2-6]; lower lr, or give other clean images"),
    ("polarizer", {"lr": 1e37, "steps": 6}, "polarizer: the loss is (nan|inf) in step [2-6]; lower lr"),
    ("distill", {"lr": 1e38, "steps": 6}, "distill: the loss is (nan|inf) in step [2-6]; lower lr"),
    ("finetune", {"lr": 1e38, "steps": 6}, "finetune: the loss is (nan|inf) in step [2-6]; lower lr"),
    ("ft_sam", {"rho": 1e38, "steps": 6}, "ft_sam: the loss is (nan|inf) in step [1-6]; lower lr"),
    ("rnp", {"tune_lr": 1e30}, r"rnp: the loss is (nan|inf) in step \d+; lower lr"),
    ("rnp", {"lr": 1e-12}, "rnp: the network did not forget the clean images in 400 steps of lr=1e-12; change lr"),
]


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """Knows its bars."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    model = nn.Sequential(body, nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 4))
    return knows_bars(model, steps=40)


@pytest.mark.parametrize(("method", "knobs", "says"), WILD)
def test_a_loss_that_is_not_finite_ends_in_words(method: str, knobs: dict[str, Any], says: str, trained: nn.Module) -> None:
    before = copy.deepcopy(trained.state_dict())
    found = purify(trained, bars(240), purifiers.create(method, **knobs), mean=(0.5,), std=(0.25,), runtime=CPU)
    assert found.stopped is not None and re.match(says, found.stopped), found.stopped
    assert found.status == "rejected" and found.model is trained and found.chosen is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())
    assert not found.candidates or "tune_lr" in knobs  # cuts come before
