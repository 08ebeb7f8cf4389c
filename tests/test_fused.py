"""Fused optimizers: which are, and that they take the steps of timm's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn

from nab_defense import io
from nab_defense.runtime import Runtime, fixed_seed
from nab_defense.train import TrainConfig, fit

CPU = Runtime(device="cpu", precision="float32", seed=3)
LABELS = torch.arange(40) % 2
IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.5 * (2 * LABELS - 1).view(-1, 1, 1, 1)
BATCHES = list(zip(IMAGES.split(10), LABELS.split(10), strict=True))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, 2))


def config(opt: str) -> TrainConfig:
    return TrainConfig(epochs=3, batch_size=10, opt=opt, lr=0.01, sched="none")


OPTIMIZERS = [("sgd", True), ("momentum", True), ("Adam", True), ("adamw", True), ("lamb", None), ("rmsprop", None)]


@pytest.mark.parametrize(("opt", "fused"), OPTIMIZERS)
def test_a_fused_optimizer_takes_the_steps_of_timms(opt: str, fused: bool | None, tmp_path: Path) -> None:
    model, reference, state = network(), network(), tmp_path / "state"
    fit(model, BATCHES, runtime=CPU, train=config(opt), state=state)
    assert {group.get("fused") for group in io.load_state(state)["optimizer"]["param_groups"]} == {fused}
    CPU.place(reference)
    theirs = create_optimizer_v2(reference, opt=opt, lr=0.01, weight_decay=5e-4, momentum=0.9)
    for epoch in range(3):
        fixed_seed(CPU.seed, epoch)
        for images, labels in BATCHES:
            theirs.zero_grad()
            F.cross_entropy(reference(CPU.put(images)), labels).backward()
            theirs.step()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_a_training_without_it_left_goes_on_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, resumed, state = network(), network(), tmp_path / "state"

    def stop(model: nn.Module, epoch: int) -> bool:
        return epoch == 1

    with monkeypatch.context() as before:
        before.setattr("nab_defense.train.FUSED", ())
        fit(straight, BATCHES, runtime=CPU, train=config("adamw"))
        fit(network(), BATCHES, runtime=CPU, train=config("adamw"), state=state, after_epoch=stop)
    history = fit(resumed, BATCHES, runtime=CPU, train=config("adamw"), state=state, resume=True)
    assert len(history) == 3
    assert all(torch.equal(one, other) for one, other in zip(straight.parameters(), resumed.parameters(), strict=True))
