"""Every purifier on a backdoored network of every family: the backdoor goes, or the original comes back."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import timm
import torch
from torch import nn

from nab_defense.bench.attacks import attacks
from nab_defense.bench.evaluate import Cases, evaluate
from nab_defense.bench.poison import poison_source, triggered_source
from nab_defense.clean import CleanSet
from nab_defense.data import Source, build_loader, build_transform, open_source
from nab_defense.purify import purifiers, purify
from nab_defense.runtime import Runtime, fixed_seed
from nab_defense.train import TrainConfig, fit

pytestmark = pytest.mark.slow

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "residual": ("test_resnet", {}),
    "preactivation": ("resnetv2_18", {"layers": [1, 1, 1, 1], "channels": [32, 64, 96, 128], "stem_type": "fixed"}),
    "convnext": ("test_convnext", {}),
    "efficientnet": ("test_efficientnet", {}),
    "mobilenet": ("mobilenetv3_small_050", {}),
    "regnet": ("regnetx_002", {}),
    "vgg": ("vgg11_bn", {"num_features": 128}),
    "nfnet": ("test_nfnet", {}),
    "vit": ("test_vit", {"img_size": 32, "patch_size": 4}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)},
    ),
    "mixer": ("mixer_s32_224", {"img_size": 32, "patch_size": 4, "num_blocks": 4, "embed_dim": 96}),
}
SIZE, MEAN, STD = 32, (0.306,), (0.376,)
RUNTIME = Runtime(device="cpu", threads=1)
SCHEDULE = TrainConfig(epochs=30, batch_size=64, opt="adamw", lr=2e-3, weight_decay=0.05, warmup_epochs=2)


def loader(source: Source, *, training: bool) -> Any:
    transform = build_transform("crop_flip" if training else "none", SIZE, hflip=0.0)
    knobs: dict[str, Any] = {"size": SIZE, "mean": MEAN, "std": STD, "runtime": RUNTIME}
    return build_loader(source.view(), transform, batch_size=64 if training else 256, training=training, **knobs)


@functools.cache
def backdoored(family: str) -> tuple[nn.Module, Cases]:
    attack = attacks.create("blend", alpha=0.3)
    train, test = open_source("digits"), open_source("digits", split="test")
    poisoned, _ = poison_source(train, attack, rate=0.1, target=0, seed=0)
    triggered, true = triggered_source(test, attack, target=0, seed=0)
    name, settings = FAMILIES[family]
    fixed_seed(0)
    network = timm.create_model(name, num_classes=10, in_chans=1, **settings)
    fit(network, loader(poisoned, training=True), runtime=RUNTIME, train=SCHEDULE)
    cases = Cases(loader(test, training=False), test.labels, loader(triggered, training=False), triggered.labels, true)
    return network.eval(), cases


@functools.cache
def clean_images() -> CleanSet:
    view = open_source("digits").limited(500, 0).view()
    view.transform = build_transform("none", SIZE)
    return CleanSet.read(view, hflip=0.0)


def shown(model: nn.Module, cases: Cases) -> tuple[float, float]:
    found = evaluate(model, cases, RUNTIME)
    assert found.asr is not None
    return found.acc.value, found.asr.value


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backdoor_is_there(family: str) -> None:
    acc, asr = shown(*backdoored(family))
    print(f"{family}: {acc:.3f}/{asr:.3f}")
    assert acc > 0.85 and asr > 0.9


@pytest.mark.parametrize("method", purifiers.names())
@pytest.mark.parametrize("family", FAMILIES)
def test_the_backdoor_goes_or_the_original_comes_back(family: str, method: str) -> None:
    network, cases = backdoored(family)
    made = purifiers.create(method)
    clean = clean_images() if made.labelled else dataclasses.replace(clean_images(), labels=None)
    try:
        result = purify(network, clean, made, mean=MEAN, std=STD, runtime=RUNTIME)
    except ValueError as error:
        print(f"{family} {method}: refused, {error}")
        return
    acc, asr = shown(result.model, cases)
    print(f"{family} {method}: {result.status} {acc:.3f}/{asr:.3f}", result.before, result.after, result.seconds)
    if result.status == "rejected":
        weights = network.state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in result.model.state_dict().items())
    else:
        assert asr < 0.1
