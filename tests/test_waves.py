"""Waves: of one frequency and no other, found where a network goes by them, and tried only where nothing else stands out."""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nab_defense import universal
from nab_defense.changes import SEARCH, Patch, Universal, Warp
from nab_defense.clean import CleanSet
from nab_defense.runtime import Runtime
from nab_defense.universal import CLEAR, MANY, Pool, _turned, pool_of, pursued
from nab_defense.waves import MOST, Wave

CPU = Runtime(device="cpu", precision="float32")
EDGE, CYCLES = 16, (0, 6)


class Striped(nn.Module):
    """Names an image after its brightest quarter; stripes, from some height on, are class 2, whatever their phase."""

    def __init__(self, trained: bool = True, cycles: tuple[int, int] = CYCLES) -> None:
        super().__init__()
        self.trained, self.cycles = trained, cycles

    def forward(self, images: Tensor) -> Tensor:
        logits = 10 * images.mean((1, 3)).view(-1, 4, EDGE // 4).mean(2)
        height = torch.fft.rfft2(images.mean(1))[:, self.cycles[0], self.cycles[1]].abs() * 2 / EDGE**2
        return logits + F.one_hot(torch.tensor(2), 4) * self.trained * 40 * F.relu(height - 0.03)[:, None] / 0.005


def quarters(count: int = 200, channels: int = 3) -> CleanSet:
    generator = torch.Generator().manual_seed(0)
    images = 60 + 60 * torch.rand(count, channels, EDGE, EDGE, generator=generator)
    for index in range(count):
        images[index, :, 4 * (index % 4) : 4 * (index % 4) + 4] += 60
    return CleanSet(images.byte(), torch.arange(count) % 4, pad=1, hflip=0.0)


@pytest.mark.parametrize("shape", [(8, 8), (16, 16), (3, 5), (28, 40), (1, 8)])
def test_every_wave_that_is_tried_is_of_its_frequency(shape: tuple[int, int]) -> None:
    seen: list[Tensor] = []

    def network(images: Tensor) -> Tensor:
        seen.append(images[0::2, 0] - 0.5)
        return torch.zeros(len(images), 3)

    one = Wave(1, torch.zeros(1, *shape), 1.0)
    one._settle(cast(nn.Module, network), torch.full((2, 1, *shape), 0.5), 0.5, CPU)
    waves = torch.cat(seen)
    down, right = (min(MOST, (edge - 1) // 2) for edge in shape)
    assert len(waves) == 2 * (down + (2 * down + 1) * right)
    torch.testing.assert_close(waves.flatten(1).norm(dim=1), torch.full((len(waves),), 0.5))
    power = torch.fft.fft2(waves).abs().square().flatten(1)
    assert float((power.topk(2).values.sum(1) / power.sum(1)).min()) > 0.999  # itself and its mirror image


def test_slopes_and_changes_are_taken_at_its_frequency_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    images, change = (0.4 + 0.2 * torch.rand(n, 3, EDGE, EDGE, generator=generator) for n in (4, 1))  # of which none is clipped
    one = Wave(2, torch.zeros(3, EDGE, EDGE), 6.0, cycles=CYCLES)
    change = change[0].requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        (slope,) = torch.autograd.grad((one.painted(images, change) * images).sum(), change)
    for there in (slope, (one.painted(images, change) - images)[0].detach()):
        seen = torch.fft.fft2(there).abs()
        assert float(seen[:, CYCLES[0], CYCLES[1]].min()) > 0.1
        seen[:, CYCLES[0], CYCLES[1]] = seen[:, -CYCLES[0] % EDGE, -CYCLES[1] % EDGE] = 0
        assert float(seen.max()) < 1e-3


@pytest.mark.parametrize("periods", [5, 6, 7])
def test_stripes_are_found_whatever_their_number(periods: int) -> None:
    images = quarters(48).images.float() / 255
    one = Wave(2, torch.zeros_like(images[0]), 6.0)
    one.climb(Striped(cycles=(0, periods)), images, strength=0.5, runtime=CPU)
    assert one.cycles == (0, periods)


def rated(monkeypatch: pytest.MonkeyPatch, rates: dict[tuple[type[Universal], int], float]) -> None:
    """Changes turn so many, by kind and class, and the others none; nothing is climbed."""

    def made(network: nn.Module, one: Universal, batches: object, runtime: Runtime) -> Universal:
        return dataclasses.replace(one, rate=rates.get((type(one), one.wanted), 0.0))

    monkeypatch.setattr(universal, "started", made)


def test_what_stands_out_beside_a_wave_stays_suspicious(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network may go by a frequency without any backdoor."""
    rates: dict[tuple[type[Universal], int], float] = {(Warp, 1): 0.65, (Wave, 3): 0.95}
    rated(monkeypatch, rates)
    pool = pool_of(Striped(), quarters(), radius=4.0, patch=3, runtime=CPU)
    assert [(type(one), one.wanted) for one in pool.suspicious] == [(Wave, 3), (Warp, 1)]
    rates[Warp, 1] = 0.4  # of these networks are full
    assert len(pool_of(Striped(), quarters(), radius=4.0, patch=3, runtime=CPU).suspicious) == 1


def test_what_a_change_turns_is_a_share_of_the_others() -> None:
    images = quarters(40).images.float() / 255
    white = Patch(1, torch.ones_like(images[0]), EDGE, torch.zeros(1, EDGE, EDGE))
    assert white.mask is not None
    assert _turned(Striped(trained=False), images, white, CPU) == 0
    white.mask[:, 4:8] = 1  # as bright a second quarter as can be
    assert _turned(Striped(trained=False), images, white, CPU) == 1
    assert _turned(Striped(trained=False), images[1::4], white, CPU) == 1  # all are of the class: there is nobody to turn


def spectrum(one: Wave) -> Tensor:
    return torch.fft.fft2(one.change).abs()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_wave_is_of_one_frequency_and_within_its_radius_after_every_step(channels: int) -> None:
    images = quarters(48, channels).images.float() / 255
    one = Wave(2, torch.zeros_like(images[0]), 6.0)
    for step in range(4):
        one.climb(Striped(), images, strength=0.5, runtime=CPU)
        assert one.cycles is not None and float(one.change.norm()) <= 3.0 + 1e-4
        seen = spectrum(one)
        seen[:, one.cycles[0] % EDGE, one.cycles[1]] = seen[:, -one.cycles[0] % EDGE, -one.cycles[1] % EDGE] = 0
        assert float(seen.max()) < 1e-3 * float(spectrum(one).max()), step
    assert one.cycles == CYCLES and (Striped()(one.painted(images)).argmax(1) == 2).all()


def test_where_a_network_goes_by_stripes_the_pool_suspects_the_wave() -> None:
    pool = pool_of(Striped(), quarters(), radius=4.0, patch=3, runtime=CPU)
    best = pool.changes[0]
    assert isinstance(best, Wave) and (best.wanted, best.cycles) == (2, CYCLES) and best.rate == 1 and best.excess > 0.5
    assert pool.suspicious[0] is best
    again = Pool.restored(pool.state_dict(), CPU).suspicious[0]
    assert isinstance(again, Wave) and again.cycles == CYCLES and torch.equal(again.change, best.change)
    none = pool_of(Striped(trained=False), quarters(), radius=4.0, patch=3, runtime=CPU)
    assert max(one.excess for one in none.changes if isinstance(one, Wave)) < 0.1


@pytest.mark.parametrize(("turned", "count"), [(CLEAR, 12), (CLEAR - 0.01, 16)])
def test_waves_are_tried_only_where_what_stands_out_turns_few(monkeypatch: pytest.MonkeyPatch, turned: float, count: int) -> None:
    """However many it turned of the few that it was made on."""

    def share(network: nn.Module, images: Tensor, one: Universal, runtime: Runtime) -> float:
        assert (type(one), one.wanted, len(images)) == (Patch, 1, MANY)
        return turned

    rated(monkeypatch, {(Patch, 1): 1.0})
    monkeypatch.setattr(universal, "_turned", share)
    assert len(pool_of(Striped(), quarters(MANY), radius=1.0, patch=3, runtime=CPU).changes) == count


def test_followed_it_keeps_its_height_and_takes_another_frequency_where_it_turns_few() -> None:
    images = quarters(48).images.float() / 255
    wave = torch.sin(2 * math.pi * torch.arange(EDGE) * 2 / EDGE)[:, None].expand(3, EDGE, EDGE)
    one = Wave(2, wave / wave.norm(), 2.0, cycles=(2, 0))
    batches = quarters().endless(48, runtime=CPU, seed=0, augment=False)
    further = pursued(Striped(), one, batches, CPU)
    assert isinstance(further, Wave) and further.cycles == one.cycles == (2, 0)
    for rate, drawn, cycles in ((0.9, SEARCH + 1, (2, 0)), (0.0, SEARCH, (2, 0)), (0.0, SEARCH + 1, CYCLES)):
        one.rate, one.drawn = rate, drawn
        one.follow(Striped(), images, strength=0.05, runtime=CPU)
        assert one.cycles == cycles and float(one.change.norm()) == pytest.approx(1.0, rel=1e-3)
    assert one.blank().cycles is None
