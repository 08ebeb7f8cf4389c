"""Optimizers that need second derivatives, or what is not here; and a warm-up that does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from nab_defense.runtime import Runtime
from nab_defense.train import TrainConfig, build_optimizer, fit

CPU = Runtime(device="cpu", precision="float32")
BATCHES = [(torch.randn(8, 1, 2, 2), torch.arange(8) % 3)] * 3


def test_an_optimizer_of_second_order_trains() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    before = network[1].weight.detach().clone()
    fit(network, BATCHES, runtime=CPU, train=TrainConfig(epochs=2, opt="adahessian", lr=0.1))
    after = network[1].weight.detach()
    assert torch.isfinite(after).all() and (after - before).abs().max() > 0.01


def test_one_that_cannot_be_built_is_named() -> None:
    with pytest.raises(ValueError, match=r"the optimizer 'fusedadam' cannot be used: \S"):
        build_optimizer(nn.Linear(4, 3), TrainConfig(opt="fusedadam"), CPU)


def test_a_warm_up_that_does_not_fit_is_said(caplog: pytest.LogCaptureFixture) -> None:
    fit(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), BATCHES, runtime=CPU, train=TrainConfig(epochs=2, warmup_epochs=5))
    assert "warmup_epochs=5 are cut to 1: there are 2 epochs" in caplog.text


@pytest.mark.parametrize("opt", ["adahessian", "lamb", "adamw", "madgrad", "muon"])
def test_a_killed_run_ends_with_the_same_weights(opt: str, tmp_path: Path) -> None:
    def trained(state: Path, *, epochs: int, resume: bool = False) -> nn.Module:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        stop = {"after_epoch": lambda _, epoch: epoch == epochs, "state": state, "resume": resume}
        fit(network, BATCHES, runtime=CPU, train=TrainConfig(epochs=4, opt=opt, lr=0.1), **stop)
        return network

    whole = trained(tmp_path / "whole.state", epochs=4)
    trained(tmp_path / "cut.state", epochs=2)
    resumed = trained(tmp_path / "cut.state", epochs=4, resume=True)
    assert torch.equal(whole[1].weight, resumed[1].weight)  # type: ignore[index]
