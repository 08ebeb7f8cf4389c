"""Networks that timm does not have, for `--model recipes.networks:NAME`."""

from __future__ import annotations

from torch import nn

__all__ = ["ibau_cifar10"]


def ibau_cifar10() -> nn.Module:
    """The network of the CIFAR-10 models that were published with I-BAU [Zeng et al. 2022]; images (B, 3, 32, 32) in
    [0, 1], 10 classes."""
    layers, before = list[nn.Module](), 3
    for width, drop in ((32, 0.3), (64, 0.4), (128, 0.4)):
        for _ in range(2):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ELU()]
            before = width
        layers += [nn.MaxPool2d(2), nn.Dropout(drop)]
    network = nn.Sequential()
    network.add_module("features", nn.Sequential(*layers))
    network.add_module("flatten", nn.Flatten())
    network.add_module("classifier", nn.Linear(2048, 10))
    return network
