"""I-BAU: the hypergradient against autograd, and a planted trigger unlearned."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nab_defense.clean import CleanSet, Pixels
from nab_defense.purify.ibau import FORMS, IBAU, hypergradient
from tests.purify.offered import offered

TERMS, RATE = 4, 0.1


def problem() -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """A two-layer network in float64, images, labels and a change."""
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.randn(6, 5, generator=generator, dtype=torch.float64),
        torch.randn(5, 3, generator=generator, dtype=torch.float64),
    ]
    images = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    change = 0.3 * torch.randn(6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (8,), generator=generator)
    return [p.requires_grad_(True) for p in params], images, labels, change


def losses(params: list[Tensor], images: Tensor, labels: Tensor) -> tuple:
    def outer(change: Tensor) -> Tensor:
        return F.cross_entropy(torch.tanh((images + change) @ params[0]) @ params[1], labels)

    def inner(change: Tensor) -> Tensor:
        return change.square().sum() - F.cross_entropy(torch.tanh((images + change) @ params[0]) @ params[1], labels)

    return outer, inner


def unrolled() -> list[Tensor]:
    """The truncated Neumann series, term by term, with explicit second derivatives."""
    params, images, labels, change = problem()
    outer, inner = losses(params, images, labels)
    change.requires_grad_(True)
    push, *direct = torch.autograd.grad(outer(change), [change, *params])
    hessian = torch.autograd.functional.hessian(inner, change)
    series = sum(torch.linalg.matrix_power(torch.eye(6, dtype=torch.float64) - RATE * hessian, k) for k in range(TERMS))
    (slope,) = torch.autograd.grad(inner(change), change, create_graph=True)
    mixed = torch.autograd.grad(slope, params, series @ push)
    return [d - RATE * m for d, m in zip(direct, mixed, strict=True)]


@pytest.mark.parametrize(("form", "tolerance"), [("exact", 1e-10), ("fd", 1e-6)])
def test_hypergradient_is_the_neumann_series(form: str, tolerance: float) -> None:
    params, images, labels, change = problem()
    outer, inner = losses(params, images, labels)
    value, grads = hypergradient(outer, inner, change, params, form=form, terms=TERMS, rate=RATE)
    assert value.item() == pytest.approx(outer(change).item())
    for grad, naive in zip(grads, unrolled(), strict=True):
        torch.testing.assert_close(grad, naive, rtol=tolerance, atol=tolerance)


def test_hypergradient_converges_to_the_derivative_of_the_inner_minimum() -> None:
    """For a quadratic inner problem: change* = w, outer = change^2 / 2, so that d outer / dw = w."""
    weight = torch.tensor([1.5, -0.5], dtype=torch.float64, requires_grad=True)

    def inner(change: Tensor) -> Tensor:
        return (change - weight).square().sum() / 2

    def outer(change: Tensor) -> Tensor:
        return change.square().sum() / 2

    for form in ("exact", "fd"):
        _, (grad,) = hypergradient(outer, inner, weight.detach(), [weight], form=form, terms=200, rate=0.1)
        torch.testing.assert_close(grad, weight.detach(), rtol=1e-5, atol=1e-5)


def test_the_direct_part_alone_asks_for_no_slope_of_the_change() -> None:
    params, images, labels, change = problem()
    outer, inner = losses(params, images, labels)
    asked = []

    def noting(change: Tensor) -> Tensor:
        asked.append(change.requires_grad)
        return outer(change)

    _, grads = hypergradient(noting, inner, change, params, form="none", terms=TERMS, rate=RATE)
    assert asked == [False]
    for grad, direct in zip(grads, torch.autograd.grad(outer(change), params), strict=True):
        assert torch.equal(grad, direct)


def test_both_forms_go_one_step_on_a_network_with_attention() -> None:
    pixels = torch.randint(0, 256, (24, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    clean = CleanSet(pixels.to(torch.uint8), torch.arange(24) % 2)
    moves = {}
    for form in FORMS:
        torch.manual_seed(0)
        vit = timm.create_model("test_vit", img_size=8, patch_size=4, in_chans=1, num_classes=2)
        before = nn.utils.parameters_to_vector(vit.parameters()).detach().clone()
        list(offered(IBAU(form=form, rate=1.0, steps=1, batch_size=12), Pixels(vit, [0.5], [0.25]).eval(), clean))
        moves[form] = nn.utils.parameters_to_vector(vit.parameters()).detach() - before
    implicit = moves["exact"] - moves["none"]  # what the way of the inner minimum adds
    assert 0 < (moves["fd"] - moves["exact"]).norm() < 0.15 * implicit.norm()  # as far as float32 tells


def test_a_setting_that_no_form_takes_is_refused() -> None:
    with pytest.raises(ValueError, match="form must be one of exact, fd, none"):
        IBAU(form="hvp")
    with pytest.raises(ValueError, match="fraction must be in"):
        IBAU(fraction=1.0)
