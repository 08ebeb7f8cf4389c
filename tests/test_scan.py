from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nab_defense import ranks, scan
from nab_defense.runtime import Runtime
from nab_defense.scan import EarlyScan, Scan, features_and_logits, scan_model

CPU = Runtime(device="cpu", precision="float32")
FAMILIES = {
    "test_resnet": {},
    "test_vit": {"img_size": 32},
    "test_convnext": {},
    "test_efficientnet": {},
    "test_byobnet": {},
    "test_mambaout": {},
    "test_nfnet": {},
}


def build(name: str = "test_resnet", classes: int = 4, **knobs: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=classes, **knobs)
    return model.eval()


class Batches:
    """Images in order, `size` a batch."""

    def __init__(self, count: int = 13, size: int = 4, classes: int = 4) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(count, 3, 32, 32, generator=generator)
        self.labels = torch.arange(count) * 7 % classes
        self.size = size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.images.split(self.size), self.labels.split(self.size), strict=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_the_networks_and_features_are_what_its_classifier_sees(name: str) -> None:
    model, images = build(name, **FAMILIES[name]), Batches().images[:2]
    seen: list[Tensor] = []
    classifier = model.get_classifier()  # type: ignore[operator]
    classifier.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    features, logits = features_and_logits(model, images)
    assert torch.equal(logits, model(images))
    assert features.shape == (2, classifier.in_features)
    torch.testing.assert_close(features, seen[0], rtol=0, atol=0)


def test_scan_equals_a_naive_pass() -> None:
    model, batches = build(), Batches(count=13, size=4)  # the last batch has one sample
    scan = scan_model(model, batches, batches.labels.numpy(), runtime=CPU, fingerprint="f")
    with torch.no_grad():
        logits = model(batches.images)
    naive = -logits.log_softmax(1)[torch.arange(13), batches.labels]
    np.testing.assert_allclose(scan.losses, naive.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scan.logits, logits.numpy(), rtol=1e-4, atol=1e-5)
    assert scan.features.shape == (13, model.num_features) and (scan.losses >= 0).all()
    assert scan.labels.tolist() == batches.labels.tolist()
    assert (len(scan), scan.num_classes, scan.fingerprint, scan.epoch) == (13, 4, "f", 0)
    assert scan.labels.dtype == np.int64
    assert all(array.dtype == np.float32 for array in (scan.losses, scan.logits, scan.features))


def test_how_the_batches_are_cut_does_not_matter() -> None:
    model = build("test_vit", img_size=32)
    scans = [scan_model(model, b, b.labels.numpy(), runtime=CPU) for b in (Batches(size=1), Batches(size=13))]
    np.testing.assert_allclose(scans[0].features, scans[1].features, rtol=1e-4, atol=1e-5)


def broken() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield next(iter(Batches()))
    raise OSError("gone")


@pytest.mark.parametrize("training", [True, False])
def test_a_scan_leaves_the_network_as_it_was(training: bool) -> None:
    model, batches = build(drop_rate=0.5).train(training), Batches()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scans = [scan_model(model, batches, batches.labels.numpy(), runtime=CPU) for _ in range(2)]
    assert model.training is training
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)).train(not training)
    scan_model(model, batches, batches.labels.numpy(), runtime=CPU)
    with pytest.raises(OSError, match="gone"):
        scan_model(model, broken(), batches.labels.numpy(), runtime=CPU)
    assert model.training is training and frozen.training is not training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert np.array_equal(scans[0].logits, scans[1].logits)


@pytest.mark.parametrize("labels", ["shuffled", "short", "long"])
def test_a_loader_out_of_order_is_refused(labels: str) -> None:
    batches = Batches()
    expected = {"shuffled": batches.labels.roll(1), "short": batches.labels[:-1], "long": torch.arange(14) * 7 % 4}[labels]
    with pytest.raises(ValueError, match="does not give the source's samples in order; use one without shuffling"):
        scan_model(build(), batches, expected.numpy(), runtime=CPU)


def test_reduced_precision_gives_float32_arrays() -> None:
    batches = Batches(count=3)
    scan = scan_model(build(), batches, batches.labels.numpy(), runtime=Runtime(device="cpu", precision="bfloat16"))
    exact = scan_model(build(), batches, batches.labels.numpy(), runtime=CPU)
    assert scan.logits.dtype == np.float32
    np.testing.assert_allclose(scan.logits, exact.logits, atol=0.05)


def test_early_scan_reads_after_each_epoch_until_told_to_stop() -> None:
    model, batches, seen = build(), Batches(), []

    def look(scan: Scan) -> bool:
        seen.append(scan)
        return len(seen) == 2

    watch = EarlyScan(batches, batches.labels.numpy(), look=look, runtime=CPU, fingerprint="f")
    assert watch.last is None
    assert [watch(model, epoch) for epoch in (1, 2)] == [False, True]
    assert [scan.epoch for scan in seen] == [1, 2] and watch.last is seen[1] and seen[1].fingerprint == "f"
    expected = F.cross_entropy(torch.from_numpy(seen[0].logits), batches.labels, reduction="none").numpy()
    np.testing.assert_array_equal(seen[0].losses, expected)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(poison: float) -> None:
    model, batches = build(), Batches()
    with torch.no_grad():
        model.get_classifier().bias.fill_(poison)  # type: ignore[operator]
    watch = EarlyScan(batches, batches.labels.numpy(), look=lambda scan: False, runtime=CPU, fingerprint="")
    with pytest.raises(ValueError, match=r"the scan's loss is not finite after epoch 3; lower scan.lr"):
        watch(model, 3)


def test_large_arrays_lie_in_a_file_with_the_same_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NAB_CACHE", str(tmp_path))
    model, batches = build(), Batches()
    held = scan_model(model, batches, batches.labels.numpy(), runtime=CPU)
    monkeypatch.setattr(scan, "HELD", 4 * 13 * 4)  # the logits fit, the features do not
    mapped = scan_model(model, batches, batches.labels.numpy(), runtime=CPU)
    assert isinstance(mapped.features, np.memmap) and not isinstance(mapped.logits, np.memmap)
    for name in ("features", "logits", "losses"):
        np.testing.assert_array_equal(getattr(mapped, name), getattr(held, name))
    assert not list((tmp_path / "scans").iterdir())  # the file has no name: it goes with the array


def test_a_disk_without_room_is_said_before_anything_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("NAB_CACHE", str(tmp_path))
    monkeypatch.setattr(scan, "HELD", 0)
    monkeypatch.setattr("os.posix_fallocate", full)
    model, batches = build(), Batches()
    with pytest.raises(ValueError, match=r"scans has no room for 0.0 GB of features \(No space left.*NAB_CACHE name a folder"):
        scan_model(model, batches, batches.labels.numpy(), runtime=CPU)


def test_a_loader_that_gives_more_than_the_labels_is_refused() -> None:
    model, batches = build(), Batches()
    with pytest.raises(ValueError, match="does not give the source's samples in order"):
        scan_model(model, batches, batches.labels.numpy()[:-1], runtime=CPU)


def test_ranks_tell_each_other_one_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of two, of which the other sees the same: every batch comes twice."""

    class Twice(Batches):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for batch in super().__iter__():
                yield from (batch, batch)

    sent: list[int] = []

    def exchange(message: bytes) -> list[bytes]:
        sent.append(len(message))
        return [message, message]

    model, batches = build(), Twice(count=12, size=4)
    labels = torch.cat([targets for _, targets in batches]).numpy()
    alone = scan_model(model, batches, labels, runtime=CPU)
    monkeypatch.setattr(ranks, "_here", ranks._Here(0, 2, 0, 2))
    monkeypatch.setattr(ranks, "_exchange", exchange)
    found = scan_model(model, batches, labels, runtime=CPU)
    for name in ("features", "logits", "losses"):
        np.testing.assert_array_equal(getattr(found, name), getattr(alone, name))
    assert alone.features[:4].nbytes < max(sent) < alone.features[:8].nbytes
