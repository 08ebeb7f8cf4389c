"""Optimizers that need second derivatives, or what is not here; and a warm-up that does not fit."""

from __future__ import annotations

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
