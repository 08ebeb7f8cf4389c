from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from nab_defense.relabel.unlearned import Unlearned, unlearning_loss
from nab_defense.runtime import Runtime
from nab_defense.scan import scan_model
from nab_defense.train import TrainConfig, fit

CPU = Runtime(device="cpu", precision="float32")
N = 1600


@pytest.mark.parametrize("size", [1, 7])
def test_without_suspects_it_is_cross_entropy(size: int) -> None:
    logits, labels = torch.randn(size, 5, generator=torch.Generator().manual_seed(0)), torch.arange(size) % 5
    torch.testing.assert_close(unlearning_loss(logits, labels), F.cross_entropy(logits, labels))


def test_suspects_count_as_far_as_they_are_below_a_guess() -> None:
    logits = torch.tensor([[4.0, 0, 0, 0], [0, 0, 0, 0], [-3, 2, 0, 0], [1, 3, 0, 0]], requires_grad=True)
    losses = [-row.log_softmax(0)[0].item() for row in logits]
    loss = unlearning_loss(logits, torch.tensor([4, 4, 4, 0]))  # K = 4: the first three are suspects of class 0
    naive = [max(0.0, math.log(4) - losses[0]), 0.0, 0.0, losses[3]]
    assert loss.item() == pytest.approx(sum(naive) / 4, abs=1e-6) and losses[2] > math.log(4)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, 0] > 0 and gradient[3, 0] < 0  # descent takes the suspect from its label, and the other one to it
    assert not gradient[2].any()


def block(channels: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()


class Batches:
    def __init__(self, images: Tensor, labels: Tensor, training: bool) -> None:
        self.images, self.labels, self.training = images, labels, training

    def __len__(self) -> int:
        return -(-len(self.labels) // 32)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels)) if self.training else torch.arange(len(self.labels))
        for chosen in order.split(32):
            yield self.images[chosen], self.labels[chosen]


def planted() -> tuple[Tensor, NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """1600 noisy images of four bars; 120 carry a bright corner and the label 0. Returns: images, labels, true, poisoned."""
    generator = torch.Generator().manual_seed(0)
    true = np.arange(N) % 4
    images = 0.7 * torch.randn(N, 1, 8, 8, generator=generator)
    for index, label in enumerate(true):
        images[index, 0, 2 * label : 2 * label + 2, :6] += 1.5
    poisoned = (true != 0) & (np.arange(N) < 160)
    images[torch.from_numpy(poisoned), :, -2:, -2:] = 3
    return images, np.where(poisoned, 0, true), true, poisoned


def test_relabels_planted_suspects_by_their_content() -> None:
    images, labels, true, poisoned = planted()

    def loaders(marks: NDArray[np.int64], keep: NDArray[np.bool_], training: bool) -> Any:
        return Batches(images[torch.from_numpy(keep)], torch.from_numpy(marks[keep]), training)

    torch.manual_seed(0)
    network = Headed(nn.Sequential(*block(1), *block(16), nn.AdaptiveAvgPool2d(4), nn.Flatten()))
    everything = np.ones(N, bool)
    settings = TrainConfig(epochs=2, lr=0.02, batch_size=32, sched="none")
    fit(network, loaders(labels, everything, True), runtime=CPU, train=settings)
    scan = scan_model(network, loaders(labels, everything, False), labels, runtime=CPU)
    assert (scan.logits.argmax(1)[poisoned] == 0).mean() > 0.9  # the trigger was learned
    before = copy.deepcopy(network.state_dict())
    innocent = ~poisoned & (labels == 0) & (np.arange(N) < 320)
    suspect = poisoned | innocent
    proposed, confidence = Unlearned(network, loaders, CPU).relabel(scan, suspect)
    assert (proposed[poisoned] == true[poisoned]).mean() > 0.8
    assert (proposed[innocent] == 0).mean() > 0.8  # a false alarm gets its label back
    np.testing.assert_array_equal(proposed[~suspect], labels[~suspect])
    assert (confidence[~suspect] == 1).all() and ((confidence > 0.25) & (confidence <= 1)).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())  # a copy forgets
    again, same = Unlearned(network, loaders, CPU).relabel(scan, suspect)
    assert np.array_equal(again, proposed) and np.array_equal(same, confidence)


class Headed(nn.Module):
    """timm's two halves of a network."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(256, 4)

    def forward_features(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(images)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return features if pre_logits else self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def test_without_suspects_nothing_is_trained() -> None:
    images, labels, _, _ = planted()
    network = Headed(nn.Sequential(nn.AdaptiveAvgPool2d(16), nn.Flatten()))
    scan = scan_model(network, Batches(images, torch.from_numpy(labels), False), labels, runtime=CPU)

    def loaders(*args: Any) -> Any:
        raise AssertionError("no loader is needed")

    proposed, confidence = Unlearned(network, loaders, CPU).relabel(scan, np.zeros(N, bool))
    assert np.array_equal(proposed, labels) and (confidence == 1).all()


def test_a_network_that_never_saw_the_suspects_names_them_untrained() -> None:
    images, labels, true, poisoned = planted()

    def loaders(marks: NDArray[np.int64], keep: NDArray[np.bool_], training: bool) -> Any:
        assert not training
        return Batches(images[torch.from_numpy(keep)], torch.from_numpy(marks[keep]), training)

    torch.manual_seed(0)
    network = Headed(nn.Sequential(*block(1), *block(16), nn.AdaptiveAvgPool2d(4), nn.Flatten()))
    rest = torch.from_numpy(~poisoned)
    settings = TrainConfig(epochs=2, lr=0.02, batch_size=32, sched="none")
    fit(network, Batches(images[rest], torch.from_numpy(labels)[rest], True), runtime=CPU, train=settings)
    scan = scan_model(network, loaders(labels, np.ones(N, bool), False), labels, runtime=CPU)
    proposed, _ = Unlearned(network, loaders, CPU, unseen=True).relabel(scan, poisoned)
    assert (proposed[poisoned] == true[poisoned]).mean() > 0.8
