"""Universal perturbations: what they do to pixels, how they climb, and that a planted trigger is what the pool suspects."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nab_defense import universal
from nab_defense.changes import GRID, SEARCH, Patch, Spread, Universal, Warp, boxed
from nab_defense.clean import CleanSet
from nab_defense.runtime import Runtime
from nab_defense.universal import PROBE_CLASSES, likely_classes, pool_of, pursued, started
from tests.bars import bars

CPU = Runtime(device="cpu", precision="float32")
BLANK = torch.zeros(1, 8, 8)


class Bars(nn.Module):
    """Names an image after its brightest bar; `corner`: a bright bottom right corner, too, is class 2."""

    def __init__(self, corner: float = 0.0) -> None:
        super().__init__()
        self.corner = corner

    def forward(self, images: Tensor) -> Tensor:
        logits = 10 * images.mean((1, 3)).view(-1, 4, 2).mean(2)
        light = images[:, 0, 5:, 5:].mean((1, 2))
        return logits + F.one_hot(torch.tensor(2), 4) * self.corner * F.softplus(10 * (light - 0.7))[:, None]


def images(count: int = 48) -> Tensor:
    return bars(count).images.float() / 255


def test_a_spread_change_is_added_and_a_patch_replaces() -> None:
    pixels, change = images(4), torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.3
    assert torch.equal(Spread(0, change, 1.0).painted(pixels), boxed(pixels + change))
    mask = BLANK.clone()
    mask[:, 2:5, 1:4] = 1
    shown = Patch(0, change, 3, mask).painted(pixels)
    torch.testing.assert_close(shown[:, :, 2:5, 1:4], change[:, 2:5, 1:4].expand(4, 1, 3, 3))
    shown[:, :, 2:5, 1:4] = pixels[:, :, 2:5, 1:4]
    assert torch.equal(shown, pixels)
    assert torch.equal(Patch(0, change, 3).painted(pixels), pixels)  # it has no place yet


def test_a_warp_moves_pixels_and_repeats_the_edge() -> None:
    pixels, still = torch.rand(4, 3, 8, 12, generator=torch.Generator().manual_seed(0)), torch.zeros(2, GRID, GRID)
    torch.testing.assert_close(Warp(0, still, 1.0).painted(pixels), pixels)
    right, down = still.clone(), still.clone()
    right[0], down[1] = 2, 1  # each pixel shows what was two to the right, one below
    for change, columns, rows in ((right, [*range(2, 12), 11, 11], range(8)), (down, range(12), [*range(1, 8), 7])):
        shown = Warp(0, still, 1.0).painted(pixels, change)
        torch.testing.assert_close(shown, pixels[:, :, list(rows)][:, :, :, list(columns)], atol=1e-5, rtol=0)


@pytest.mark.parametrize("one", [Spread(1, BLANK, 1.0), Patch(1, BLANK, 3), Warp(1, torch.zeros(2, GRID, GRID), 8.0)])
def test_each_step_makes_the_class_likelier_within_its_bounds(one: Universal) -> None:
    one, network = one.blank(), Bars()
    likely = [float(network(images()).log_softmax(1)[:, 1].mean())]
    for _ in range(6):
        one.climb(network, images(), strength=0.5, runtime=CPU)
        likely.append(float(network(one.painted(images())).log_softmax(1)[:, 1].mean()))
    assert likely[-1] == max(likely) > likely[0] + 0.05
    if isinstance(one, Patch):
        assert one.mask is not None and one.mask.sum() == 9 and one.change.min() >= 0 and one.change.max() <= 1
    elif isinstance(one, Spread):
        assert float(one.change.norm()) <= 0.5 * one.radius + 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_patch_is_found_where_it_is_and_suspected_alone(seed: int) -> None:
    clean = bars(200, seed=seed)
    pool = pool_of(Bars(corner=4.0), clean, radius=2.0, patch=5, runtime=Runtime(device="cpu", precision="float32", seed=seed))
    best = pool.changes[0]
    assert len(pool.changes) == 12 and best.wanted == 2 and best.rate == 1
    patch = next(one for one in pool.changes if isinstance(one, Patch) and one.wanted == 2)
    assert patch.mask is not None and patch.mask[0, 5:, 5:].sum() >= 6 and patch.rate == 1
    assert {one.wanted for one in pool.suspicious if isinstance(one, Patch)} == {2}
    for one in pool.suspicious:
        one.rate = float(one is patch)  # as if the others were withstood: they are drawn no more
    assert all(pool.draw() is patch for _ in range(20)) and patch.drawn == 20


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_have_the_same_edge_whatever_the_channels(channels: int) -> None:
    clean = CleanSet(torch.randint(0, 256, (20, channels, 32, 32), dtype=torch.uint8))
    network = nn.Sequential(nn.Flatten(), nn.Linear(channels * 1024, 3)).requires_grad_(False)
    pool = pool_of(network, clean, radius=2.0, patch=5, runtime=CPU)
    assert {one.edge for one in pool.changes if isinstance(one, Patch)} == {5}


def test_changes_toward_another_class_must_stand_out_nearly_as_far(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {(Patch, 1): 1.0, (Spread, 1): 0.6, (Warp, 3): 0.7}

    def made(network: nn.Module, one: Universal, batches: object, runtime: Runtime) -> Universal:
        return dataclasses.replace(one, rate=rates.get((type(one), one.wanted), 0.0))

    monkeypatch.setattr(universal, "started", made)
    pool = pool_of(Bars(), bars(200), radius=2.0, patch=3, runtime=CPU)
    assert [(type(one), one.wanted) for one in pool.suspicious] == [(Patch, 1), (Spread, 1)]
    rates[Warp, 3] = 0.8
    pool = pool_of(Bars(), bars(200), radius=2.0, patch=3, runtime=CPU)
    assert {(type(one), one.wanted) for one in pool.suspicious} == {(Patch, 1), (Warp, 3), (Spread, 1)}


class Between(Bars):
    """Names an image after its brightest bar; one that lies between the places of two bars is class 2."""

    def forward(self, images: Tensor) -> Tensor:
        rows = images.mean((1, 3))
        crossing = torch.minimum(rows[:, 1:-1:2], rows[:, 2::2]).amax(1)
        return super().forward(images) + F.one_hot(torch.tensor(2), 4) * 8 * F.softplus(20 * (crossing - 0.25))[:, None]


def test_a_planted_warp_is_found() -> None:
    for network, found in ((Between(), True), (Bars(), False)):
        best = next(one for one in pool_of(network, bars(200), radius=1.0, patch=1, runtime=CPU).changes if isinstance(one, Warp))
        assert (best.rate > 0.3, best.wanted == 2 and best.excess > 0.3) == (found, found)


def test_a_warp_is_followed_no_closer_than_where_it_was_found() -> None:
    for one, least in ((Spread(1, BLANK, 8.0), 0.8), (Warp(1, torch.zeros(2, GRID, GRID), 8.0), 4.0)):
        for _ in range(12):
            one.follow(Bars(), images(), strength=0.1, runtime=CPU)
        assert float(one.change.norm()) == pytest.approx(least, rel=1e-4)


def test_made_anew_it_starts_from_nothing_and_leaves_the_old_one() -> None:
    clean = bars(200)
    batches = clean.endless(48, runtime=CPU, seed=0, augment=False)
    old = Patch(2, torch.ones(1, 8, 8), 3, torch.ones(1, 8, 8), rate=0.9, drawn=7)
    new = started(Bars(corner=4.0), old, batches, CPU)
    assert isinstance(new, Patch) and new.mask is not None and new.mask.sum() == 9 and new.drawn == 0 and new.rate == 1
    assert old.mask is not None and old.mask.sum() == 64 and old.drawn == 7 and old.rate == 0.9
    assert started(Bars(), old, batches, CPU).rate < 0.5  # no backdoor: a patch of 3x3 does not turn a bar


class Narrow(Bars):
    """Names an image after its brightest bar; a white square at one place is class 2, beyond any doubt."""

    def __init__(self, top: int = 5, left: int = 5) -> None:
        super().__init__()
        self.rows, self.columns = slice(top, top + 3), slice(left, left + 3)

    def forward(self, images: Tensor) -> Tensor:
        square = images[:, 0, self.rows, self.columns].mean((1, 2))
        return super().forward(images) + F.one_hot(torch.tensor(2), 4) * 40 * F.softplus(10 * (square - 0.7))[:, None]


def test_a_tired_patch_is_given_the_place_where_a_trigger_is() -> None:
    mask = BLANK.clone()
    mask[:, :3, :3] = 1
    batches = bars(200).endless(48, runtime=CPU, seed=0, augment=False)
    grey = torch.full_like(BLANK, 0.5)
    one = Patch(2, grey, 3, mask)
    further = pursued(Narrow(), one, batches, CPU)
    assert one.mask is mask and one.change is grey and torch.equal(grey, torch.full_like(BLANK, 0.5))  # left as it was
    assert isinstance(further, Patch) and further.mask is mask and not torch.equal(further.change, grey)
    for rate, moved in ((0.9, False), (0.0, True)):
        one.drawn, one.rate = SEARCH + 1, rate
        one.follow(Narrow(), images(), strength=1.0, runtime=CPU)
        assert one.mask is not None and torch.equal(one.mask, mask) is not moved
    assert one.mask is not None and one.mask[0, 5:, 5:].sum() >= 6 and (Narrow()(one.painted(images())).argmax(1) == 2).all()


@pytest.mark.parametrize(("top", "left"), [(0, 0), (5, 0), (2, 3), (5, 5)])
def test_a_place_is_sought_in_all_of_the_image(top: int, left: int) -> None:
    one = Patch(2, BLANK, 3)
    one.climb(Narrow(top, left), images(), strength=1.0, runtime=CPU)
    assert one.mask is not None and one.mask.sum() == 9
    assert one.mask[0, top : top + 3, left : left + 3].sum() >= 6


@pytest.mark.parametrize("shade", [0.0, 1.0])
def test_a_needle_of_one_shade_is_found_where_the_slope_tells_nothing(shade: float) -> None:
    class Needle(Bars):
        def forward(self, images: Tensor) -> Tensor:
            exact = (images[:, 0, 5:, 5:] - shade).abs().amax((1, 2)) < 0.1
            return super().forward(images) + 40 * F.one_hot(torch.tensor(2), 4) * exact[:, None]

    one = Patch(2, BLANK, 3)
    one.climb(Needle(), images(), strength=0.0, runtime=CPU)
    assert one.mask is not None and one.mask[0, 5:, 5:].sum() == 9 and (Needle()(one.painted(images())).argmax(1) == 2).all()


class Many(nn.Module):
    """Thirty classes that follow the content; one more, which a pattern turns: a faint one everywhere, or a light corner."""

    def __init__(self, pattern: Tensor, gain: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.content, self.pattern, self.gain = torch.randn(30, 64, generator=generator), pattern.flatten(), gain

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1) - 0.5
        turned = self.gain * F.softplus(10 * (flat @ self.pattern / self.pattern.norm()))
        return torch.cat([flat @ self.content.T, turned[:, None]], 1)


@pytest.mark.parametrize("radius", [2.0, 8.0, 64.0])
def test_spread_changes_get_a_radius_at_which_a_spread_trigger_stands_out(radius: float) -> None:
    network = Many(torch.randn(8, 8, generator=torch.Generator().manual_seed(5)).sign(), 20.0)
    pool = pool_of(network, bars(200), radius=radius, patch=3, runtime=CPU)
    spread = [one for one in pool.changes if type(one) is Spread]
    assert spread[0].wanted == 30 and spread[0].rate >= 0.5 and spread[0].excess > 0.4
    assert len({one.radius for one in spread}) == 1


def corner() -> Tensor:
    pattern = torch.zeros(8, 8)
    pattern[5:, 5:] = 1
    return pattern


@pytest.mark.parametrize("pattern", [torch.randn(8, 8, generator=torch.Generator().manual_seed(5)).sign(), corner()])
def test_of_many_classes_the_backdoors_is_among_the_likely(pattern: Tensor) -> None:
    with_it, without = (likely_classes(Many(pattern, gain), images(), edge=3, runtime=CPU) for gain in (20.0, 0.0))
    assert len(set(with_it)) == len(with_it) == PROBE_CLASSES
    assert 30 in with_it[:2] and 30 not in without
