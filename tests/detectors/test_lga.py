from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nab_defense.detectors import detectors
from nab_defense.detectors.lga import LGA, lga_loss


def batch(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(5, (size,), generator=generator)


def entropies(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([row.logsumexp(0) - row[label] for row, label in zip(logits, labels, strict=True)])


@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 2.0, 9.0])
def test_flooding_is_naive_and_its_gradient_is_that_of_the_mean_up_to_the_sign(gamma: float, size: int) -> None:
    logits, labels = batch(size)
    mean = entropies(logits, labels).mean()
    loss = lga_loss(gamma, "flooding")(logits, labels)
    assert loss.item() == pytest.approx(abs(mean.item() - gamma) + gamma)
    (gradient,), (plain,) = torch.autograd.grad(loss, logits), torch.autograd.grad(mean, logits)
    torch.testing.assert_close(gradient, plain if mean > gamma else -plain)


@pytest.mark.parametrize("size", [1, 2, 16])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 2.0, 9.0])
def test_per_sample_is_naive_and_turns_each_samples_gradient(gamma: float, size: int) -> None:
    logits, labels = batch(size)
    losses = entropies(logits, labels)
    signs = torch.tensor([1.0 if value > gamma else -1.0 for value in losses], dtype=torch.float64)
    loss = lga_loss(gamma, "per_sample")(logits, labels)
    assert loss.item() == pytest.approx(sum(s * v for s, v in zip(signs.tolist(), losses.tolist(), strict=True)) / size)
    (gradient,) = torch.autograd.grad(loss, logits)
    (plain,) = torch.autograd.grad(losses.mean(), logits)
    torch.testing.assert_close(gradient, signs[:, None] * plain)


def test_above_gamma_flooding_is_cross_entropy() -> None:
    logits, labels = batch(8)
    torch.testing.assert_close(lga_loss(1e-3, "flooding")(logits, labels), F.cross_entropy(logits, labels))


@pytest.mark.parametrize("form", ["flooding", "per_sample"])
def test_descent_ends_at_gamma(form: str) -> None:
    logits, labels = batch(8)
    point = logits.detach().clone().requires_grad_()
    for _ in range(400):
        (gradient,) = torch.autograd.grad(lga_loss(0.5, form)(point, labels), point)
        point = (point - 0.1 * gradient).detach().requires_grad_()
    assert entropies(point, labels).mean().item() == pytest.approx(0.5, abs=0.02)


def test_bad_settings_raise() -> None:
    with pytest.raises(ValueError, match="form must be one of flooding, per_sample, got 'flood'"):
        lga_loss(0.5, "flood")
    for gamma in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="gamma must be positive"):
            lga_loss(gamma, "flooding")


def test_the_lowest_loss_is_the_most_suspicious(make_scan) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    scan = make_scan(np.zeros((20, 2)), rng.integers(0, 3, 20), rng.normal(size=(20, 3)))
    report = detectors.create("lga").detect(scan)
    assert np.argsort(-report.scores).tolist() == np.argsort(scan.losses).tolist()
    assert report.detector == "lga" and report.fingerprint == scan.fingerprint and report.params == {}
    assert isinstance(detectors.create("lga"), LGA)
