"""Normalisations that are given clean statistics: the same network, which batches do not change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from nab_defense.clean import CleanSet, Pixels
from nab_defense.purify.base import norms, recentred, train_norms
from nab_defense.purify.distill import Distill
from nab_defense.purify.ibau import IBAU
from nab_defense.runtime import Runtime
from tests.purify.offered import offered

CPU = Runtime(device="cpu", precision="float32", seed=0)
IMAGES = torch.randint(0, 256, (96, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def network(*, affine: bool = True) -> Pixels:
    """Whose normalisations know other images."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6, affine=affine),
        nn.ELU(),
        nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(128, 4),
    )
    pixels = Pixels(made, [0.5] * 3, [0.25] * 3)
    for norm in norms(pixels).values():
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.2, 5)
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.bias, -1, 1)
    return pixels.eval().requires_grad_(False)


def answers(made: Pixels) -> Tensor:
    return made(IMAGES.float() / 255)


def by_batch(made: Pixels) -> Tensor:
    made = copy.deepcopy(made)
    train_norms(made)
    return answers(made)


def test_the_network_computes_the_same_and_batches_agree_with_it() -> None:
    before = network()
    after = recentred(copy.deepcopy(before), CleanSet(IMAGES), runtime=CPU, augment=False)
    torch.testing.assert_close(answers(after), answers(before), rtol=1e-4, atol=1e-4)
    size = answers(before).std()
    assert (by_batch(before) - answers(before)).abs().mean() > 0.3 * size  # so far from clean batches it was
    assert (by_batch(after) - answers(before)).abs().mean() < 0.03 * size
    assert not after.training and not any(norm.training for norm in norms(after).values())


def test_it_is_the_same_again_with_the_same_seed_and_on_augmented_images() -> None:
    made = [recentred(network(), CleanSet(IMAGES), runtime=CPU, augment=augment) for augment in (True, True, False)]
    weights = [torch.cat([tensor.flatten().double() for tensor in one.state_dict().values()]) for one in made]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    torch.testing.assert_close(answers(made[0]), answers(network()), rtol=1e-4, atol=1e-4)


def test_a_layer_without_weights_stays_and_the_others_move() -> None:
    before = network(affine=False)
    after = recentred(copy.deepcopy(before), CleanSet(IMAGES), runtime=CPU, augment=False)
    torch.testing.assert_close(answers(after), answers(before), rtol=1e-4, atol=1e-4)
    means = [
        [state[name] for name in state if name.endswith("running_mean")] for state in (before.state_dict(), after.state_dict())
    ]
    assert [torch.equal(old, new) for old, new in zip(*means, strict=True)] == [True, False]


def test_a_network_without_batch_normalisation_keeps_every_bit() -> None:
    torch.manual_seed(0)
    plain = Pixels(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), [0.5] * 3, [0.25] * 3).eval()
    after = recentred(copy.deepcopy(plain), CleanSet(IMAGES), runtime=CPU, augment=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), after.state_dict().values(), strict=True))


@pytest.mark.parametrize("method", [IBAU, partial(Distill, first=0.0, last=0.0, head=0.0)], ids=["ibau", "distill"])
def test_normalisations_that_follow_batches_do_not_change_what_the_network_says(method: Callable[..., IBAU | Distill]) -> None:
    before = network()
    clean = CleanSet(IMAGES, answers(before).argmax(1))
    ((_, after),) = offered(method(steps=8, lr=1e-9, fraction=0.1, augment=False), copy.deepcopy(before), clean)
    assert isinstance(after, Pixels)
    assert (answers(after.eval()) - answers(before)).abs().mean() < 0.1 * answers(before).std()
