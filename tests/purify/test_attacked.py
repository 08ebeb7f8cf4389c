"""The batches of a training against universal perturbations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nab_defense.clean import CleanSet, Pixels
from nab_defense.purify.base.hardening import _attacked
from nab_defense.purify.distill import Distill
from nab_defense.purify.run import purify
from nab_defense.runtime import Runtime
from nab_defense.universal import pool_of
from tests.bars import bars

CPU = Runtime(device="cpu", precision="float32")


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.05, 1), (0.12, 1), (0.6, 2)])
def test_one_image_at_least_is_attacked_but_for_a_fraction_of_none(fraction: float, count: int) -> None:
    network, clean = Pixels(linear(), [0.5], [0.25]).requires_grad_(False), CleanSet(bars(40).images)
    pool = pool_of(network, clean, radius=6.0, patch=5, runtime=CPU)
    how = Distill(steps=3, batch_size=4, fraction=fraction)
    counts = [batch.count for batch in _attacked(how, network, network, clean, pool, CPU)]
    assert counts[0] == count and min(counts) == min(1, count)


class Keeps(nn.Module):
    """Takes no images: what is handed to purify is looked at after it was refused."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise TypeError("no images")


def test_the_model_of_the_caller_stays_where_and_as_it_is() -> None:
    model = Keeps()
    model.convolution.weight.data = torch.randn(8, 3, 3, 3)
    strides, weight = model.convolution.weight.stride(), model.convolution.weight
    runtime = Runtime(device="cpu", channels_last=True)
    with pytest.raises(ValueError, match="no images"):
        purify(model, bars(240), Distill(), mean=(0.5,), std=(0.25,), runtime=runtime)
    assert model.convolution.weight is weight and weight.stride() == strides and model.training
