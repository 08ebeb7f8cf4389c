from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nab_defense.clean import CleanSet, Pixels
from nab_defense.purify.base import Purifier
from nab_defense.purify.clp import CLP, amplification, normalised_convolutions
from nab_defense.purify.finetune import FineTune
from nab_defense.purify.ft_sam import FTSAM, adaptive_climb, still_statistics
from nab_defense.runtime import Runtime
from tests.bars import bars
from tests.purify.offered import offered

CPU = Runtime(device="cpu", precision="float32")
PIXELS = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> Pixels:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))
    return Pixels(body, [0.5], [0.25]).requires_grad_(False).eval()


def accuracy(model: nn.Module, clean: CleanSet) -> float:
    assert clean.labels is not None
    return (model.eval()(clean.images.float() / 255).argmax(1) == clean.labels).float().mean().item()


@pytest.mark.parametrize("method", [FineTune(steps=21, rounds=3, batch_size=40), FTSAM(steps=21, rounds=3, batch_size=40)])
def test_fine_tuning_learns_and_offers_its_rounds(method: Purifier) -> None:
    clean, model = bars(240), network()
    first = accuracy(model, clean)
    method.check(model, PIXELS)
    names = [name for name, _ in offered(method, model, clean)]
    assert names == ["step 7", "step 14", "step 21"]
    assert first < 0.5 and accuracy(model, clean) > 0.9


@pytest.mark.parametrize("watched", [True, False])
def test_steps_are_counted_where_someone_watches(watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told = StringIO()
    monkeypatch.setattr(told, "isatty", lambda: watched)
    monkeypatch.setattr("sys.stderr", told)
    list(offered(FineTune(steps=3, rounds=1, batch_size=40), network(), bars(240)))
    assert ("FineTune" in told.getvalue() and "/3 [" in told.getvalue()) is watched


class Aux(nn.Sequential):
    """With more than logits while it trains."""

    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        return (logits, logits) if self.training else logits


@pytest.mark.parametrize("method", [FineTune(), FTSAM()])
def test_a_network_that_gives_more_while_it_trains_is_refused_at_once(method: Purifier) -> None:
    network = Pixels(Aux(nn.Flatten(), nn.Linear(64, 4)), [0.5], [0.25]).eval()
    with pytest.raises(ValueError, match="it gives tuple; wrap it so that it gives logits alone, in training too"):
        method.check(network, torch.rand(2, 1, 8, 8))
    assert not network.training


@pytest.mark.parametrize("method", [FineTune(steps=3, lr=1e30, batch_size=40), FTSAM(steps=3, lr=1e30, batch_size=40)])
def test_a_loss_without_end_is_an_error(method: Purifier) -> None:
    with pytest.raises(ValueError, match="lower lr"):
        list(offered(method, network(), bars(240)))


def test_the_climb_is_steepest_where_changes_count_by_the_size_of_the_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator)]
    slopes = [torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator)]
    climbs = adaptive_climb(weights, slopes, 0.5)
    relative = torch.cat([(c / w).flatten() for c, w in zip(climbs, weights, strict=True)])
    assert relative.norm().item() == pytest.approx(0.5, rel=1e-5)
    steepest = torch.cat([(w * g).flatten() for w, g in zip(weights, slopes, strict=True)])
    assert F.cosine_similarity(relative, steepest, dim=0).item() == pytest.approx(1, abs=1e-6)
    assert not torch.cat([c.flatten() for c in adaptive_climb(weights, [0 * g for g in slopes], 0.5)]).any()


def test_sam_without_climb_is_smoothed_fine_tuning() -> None:
    clean, plain, flat = bars(240), network(), network()
    list(offered(FTSAM(steps=4, rounds=1, batch_size=40, rho=0.0, smoothing=0.0), flat, clean))
    list(offered(FineTune(steps=4, rounds=1, batch_size=40), plain, clean))
    ours, theirs = flat.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "num_batches" not in name)


def test_statistics_stay_still_within() -> None:
    model = network().train()
    before = model.model[1].running_mean.clone()
    with still_statistics(model):
        model(PIXELS)
    assert torch.equal(model.model[1].running_mean, before) and model.model[1].momentum == 0.1
    model(PIXELS)
    assert not torch.equal(model.model[1].running_mean, before)


class Branches(nn.Module):
    """Pre-activation: `sum_norm` takes a sum, `late` an activation; only `conv1` and `norm` are a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.sum_norm, self.late = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.conv2, self.conv1 = nn.Conv2d(6, 6, 1), nn.Conv2d(1, 6, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        first = self.conv1(images)
        second = self.conv2(F.relu(self.norm(first)))
        total = self.sum_norm(second + first)
        activated: Tensor = self.late(self.act(self.conv2(total)))
        return activated.mean((2, 3))


def test_pairs_are_found_by_the_tensor_not_by_the_order() -> None:
    model = Branches()
    assert normalised_convolutions(model, PIXELS) == [(model.conv1, model.norm)]
    assert not model.conv1._forward_hooks and not model.norm._forward_pre_hooks


def test_amplification_is_the_spectral_norm_of_the_folded_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    conv, norm = nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    norm.weight.data = torch.randn(5, generator=generator)
    norm.running_var = torch.rand(5, generator=generator) + 0.5
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    naive = [torch.linalg.svdvals((conv.weight[c] * scale[c]).reshape(4, 9))[0] for c in range(5)]
    torch.testing.assert_close(amplification(conv, norm), torch.stack(naive).detach())


def test_clp_silences_a_loud_channel_alone() -> None:
    model = Pixels(nn.Sequential(nn.Conv2d(1, 32, 3, bias=False), nn.BatchNorm2d(32), nn.Flatten()), [0.5], [0.25]).eval()
    model.model[0].weight.data[7] *= 30
    model.model[1].bias.data.fill_(1)
    before = model(PIXELS).view(2, 32, -1)
    names = [name for name, _ in offered(CLP(strictest=4.0, rounds=2), model, bars(240))]
    after = model(PIXELS).view(2, 32, -1)
    others = torch.arange(32) != 7
    assert names == ["u 5", "u 4"]
    assert [name for name, _ in offered(CLP(strictest=3.0, rounds=1), model, bars(240))] == ["u 3"]
    assert not after[:, 7].any() and torch.equal(after[:, others], before[:, others])


def test_clp_refuses_a_network_without_batch_normalisation() -> None:
    plain = Pixels(nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten()), [0.5], [0.25])
    with pytest.raises(ValueError, match="batch normalisation"):
        CLP().check(plain, PIXELS)
    CLP().check(network(), PIXELS)
