from __future__ import annotations

import copy
import math
import re
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from nab_defense.channels import Channel, maskable, masked, prune, ranking
from nab_defense.clean import Pixels
from nab_defense.purify import rnp
from nab_defense.purify.base import Candidates, Notes, norms, purifiers
from nab_defense.purify.rnp import RNP, _logits, likely_target, suspicion
from nab_defense.runtime import Runtime
from tests.bars import bars
from tests.purify.offered import offered

CPU = Runtime(device="cpu", precision="float32")
PIXELS = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
SMALL = RNP(batch_size=20, steps=60, share=0.3)


def triggered(images: Tensor) -> Tensor:
    """A white column on the right; it means class 0."""
    images = images.clone()
    images[:, :, :, 7] = 255
    return images


@pytest.fixture(scope="module")
def trained() -> Pixels:
    """Knows the bars, and a backdoor."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    )
    network = Pixels(nn.Sequential(body, nn.Flatten(), nn.Linear(1024, 4)), [0.5], [0.25])
    clean = bars(400)
    assert clean.labels is not None
    images = torch.cat([clean.images, triggered(clean.images[:80])]).float() / 255
    labels = torch.cat([clean.labels, torch.zeros(80, dtype=torch.long)])
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(60):
        rows = torch.randperm(len(images))[:120]
        loss = F.cross_entropy(network(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.requires_grad_(False).eval()


def share(network: nn.Module, images: Tensor, labels: Tensor | int) -> float:
    return (network.eval()(images.float() / 255).argmax(1) == labels).float().mean().item()


def test_by_products() -> None:
    logits = torch.tensor([[0.0, 2.0], [0.0, 1.0], [3.0, 0.0], [0.0, 9.0]])
    assert likely_target(logits) == (1, 0.75)
    forgotten = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    kept = suspicion(torch.tensor([[0.0, 5.0], [0.0, 5.0]]), forgotten, torch.tensor([1, 1]))
    torch.testing.assert_close(kept, torch.tensor([-5.0, 0.0]))


def test_a_mask_of_ones_changes_nothing_and_of_zeros_is_pruning(trained: Pixels) -> None:
    masks = {name: torch.ones(count) for name, count in maskable(trained).items()}
    assert torch.equal(masked(trained, masks, PIXELS), trained(PIXELS))
    name = next(iter(masks))
    masks[name][3] = 0
    cut = copy.deepcopy(trained)
    prune(cut, [(name, 3)])
    torch.testing.assert_close(masked(trained, masks, PIXELS), cut(PIXELS))
    assert not torch.equal(cut(PIXELS), trained(PIXELS))


def test_ranking_is_ascending_with_ties_in_order() -> None:
    masks = {"a": torch.tensor([1.0, 0.2]), "b": torch.tensor([0.2, 0.0])}
    assert ranking(masks) == [("b", 1), ("a", 1), ("b", 0), ("a", 0)]


def test_channels_of_each_kind_of_network() -> None:
    mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    token = nn.Sequential(nn.Linear(8, 24), nn.LayerNorm(24), nn.Linear(8, 8), mlp)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 4))
    assert maskable(token) == {"3.0.weight": 32}
    assert maskable(plain) == {"0.weight": 4, "2.weight": 6}
    plain[2].register_parameter("gain", nn.Parameter(torch.ones(6, 1, 1, 1)))
    assert maskable(plain) == {"0.weight": 4, "2.gain": 6}
    computed = weight_norm(nn.Conv2d(4, 6, 3))  # a weight that follows from others cannot be scaled in place
    assert maskable(nn.Sequential(nn.Conv2d(1, 4, 3), computed, nn.Flatten(), nn.Linear(96, 4))) == {"0.weight": 4}
    normed = nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4))
    assert maskable(normed) == {"1.weight": 4}
    # neither a narrow convolution before the head nor one of a block before one of the next is an MLP's first layer
    assert maskable(nn.Sequential(normed, nn.Linear(4, 2))) == {"0.1.weight": 4}
    expand, project = nn.Sequential(nn.Conv2d(2, 4, 1)), nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    assert maskable(nn.Sequential(expand, project)) == {"1.1.weight": 2}


def test_a_network_without_channels_is_refused() -> None:
    network = Pixels(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), [0.5], [0.25])
    with pytest.raises(ValueError, match="too few channels"):
        purifiers.create("rnp").check(network, PIXELS)


def test_the_network_forgets_and_recovers_by_masks_alone(trained: Pixels) -> None:
    images, aside = bars(400).split(0.2, 0)
    before = copy.deepcopy(trained.state_dict())
    unlearned = SMALL.unlearned(trained, images, aside, CPU)
    weights = {name: weight.clone() for name, weight in unlearned.named_parameters()}
    masks = SMALL.recovered(unlearned, images, aside, CPU, 1.0)
    assert all(torch.equal(weight, before[name]) for name, weight in trained.state_dict().items())
    assert all(torch.equal(weight, weights[name]) for name, weight in unlearned.named_parameters())
    values = torch.cat(list(masks.values()))
    assert len(values) == 32 and values.min() >= 0 and values.max() <= 1 and (values < 1).any()


@pytest.mark.parametrize("augment", [True, False])
def test_crops_and_flips_only_where_they_are_asked_for(augment: bool, trained: Pixels) -> None:
    clean, shown = bars(80), []

    def network(batch: Tensor) -> Tensor:
        shown.append((255 * batch).round().byte())
        return trained(batch)

    list(islice(RNP(batch_size=20, augment=augment)._losses(network, clean, CPU), 2))
    seen, known = ({image.numpy().tobytes() for image in images} for images in (torch.cat(shown), clean.images))
    assert (seen == known) is not augment


def far_from_batches(network: Pixels) -> Pixels:
    """A copy that computes the same, whose statistics are far from those of clean batches, as in many a published model."""
    network = copy.deepcopy(network)
    torch.manual_seed(0)
    for norm in norms(network).values():
        assert norm.running_mean is not None and norm.running_var is not None
        scale, mean = (norm.running_var + norm.eps).sqrt(), norm.running_mean.clone()
        norm.running_var.mul_(torch.empty_like(scale).uniform_(0.1, 4))
        norm.running_mean.add_(2 * scale * torch.randn_like(scale))
        norm.bias.add_(norm.weight * (norm.running_mean - mean) / scale)
        norm.weight.mul_((norm.running_var + norm.eps).sqrt() / scale)
    return network


def test_it_forgets_also_where_statistics_are_far_from_clean_batches(trained: Pixels) -> None:
    clean, far = bars(400), far_from_batches(trained)
    assert clean.labels is not None
    torch.testing.assert_close(far(PIXELS), trained(PIXELS), rtol=1e-3, atol=1e-3)
    by_batch = _logits(far, clean, CPU)
    assert F.cross_entropy(by_batch, clean.labels) > math.log(4)  # that of a guess, before any step
    notes = Notes()
    next(offered(SMALL, far_from_batches(trained), clean, notes=notes))
    assert notes.unlearned is not None and share(notes.unlearned, clean.images, clean.labels) <= 0.6
    assert notes.evidence["likely_target_share"] > 0.5


def test_who_knows_nothing_by_batches_has_nothing_to_forget(trained: Pixels) -> None:
    far, (images, aside) = far_from_batches(trained), bars(400).split(0.2, 0)
    with pytest.raises(ValueError, match="by the statistics of clean batches the network knows no more than a guess"):
        SMALL.unlearned(far, images, aside, CPU)


def test_it_has_not_forgotten_while_it_knows_in_eval_mode(trained: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
    images, aside = bars(400).split(0.2, 0)
    knows = F.one_hot(aside.labels, 4).float()  # type: ignore[arg-type]
    monkeypatch.setattr(rnp, "logits_of", lambda *_: 9 * knows)
    monkeypatch.setattr(rnp, "MOST_STEPS", 40)
    with pytest.raises(ValueError, match="did not forget the clean images in 40 steps"):
        SMALL.unlearned(trained, images, aside, CPU)


def test_of_two_classes_more_than_half_of_the_skill_is_forgotten() -> None:
    clean = bars(300)
    assert clean.labels is not None
    clean = clean.take(torch.nonzero(clean.labels < 2)[:, 0])
    torch.manual_seed(0)
    network = Pixels(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)), [0.5], [0.25])
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(80):
        loss = F.cross_entropy(network(clean.images.float() / 255), clean.labels)  # type: ignore[arg-type]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, aside = clean.split(0.2, 0)
    assert share(network, aside.images, aside.labels) == 1  # type: ignore[arg-type]
    unlearned = SMALL.unlearned(network.requires_grad_(False), images, aside, CPU)
    assert share(unlearned, aside.images, aside.labels) <= 0.75  # type: ignore[arg-type]


def test_failed_recovery_is_an_error(trained: Pixels) -> None:
    with pytest.raises(ValueError, match="recovery failed"):
        next(offered(RNP(batch_size=40, recover_steps=1, mask_lr=1e-6), copy.deepcopy(trained), bars(400)))


def test_cuts_weaken_a_backdoor_and_stay_cut(trained: Pixels) -> None:
    clean = bars(400)
    assert clean.labels is not None
    others = triggered(clean.images[clean.labels != 0])
    assert share(trained, clean.images, clean.labels) > 0.95 and share(trained, others, 0) > 0.9
    names, network = [], nn.Module()
    for name, network in offered(SMALL, copy.deepcopy(trained), clean):  # noqa: B007 - the last is looked at
        names.append(name)
    zeros = sum(int((network.get_parameter(name) == 0).sum()) for name in maskable(network))
    assert names[-1] == "10 of 32 channels, step 60" and zeros == 10
    assert all(re.fullmatch(r"\d+ of 32 channels", name) for name in names[:-1])
    assert share(network, clean.images, clean.labels) > 0.9 and share(network, others, 0) < 0.2


def test_a_cut_that_training_does_not_win_back_is_made_anew_with_less(trained: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
    def tuned(_: RNP, network: Pixels, gone: list[Channel], *__: object) -> Candidates:
        network = copy.deepcopy(network)
        if len(gone) > 5:
            prune(network, ranking({name: torch.zeros(count) for name, count in maskable(network).items()}))  # knows nothing
        yield f"step {len(gone)}", network

    monkeypatch.setattr(RNP, "_tuned", tuned)
    for share, cuts in ((0.9, [29, 10, 3]), (0.4, [13, 4]), (0.15, [5])):
        every = [name for name, _ in offered(RNP(batch_size=20, share=share), copy.deepcopy(trained), bars(400))]
        assert [name for name in every if "step" in name] == [f"{cut} of 32 channels, step {cut}" for cut in cuts]


def test_without_a_share_there_are_the_papers_cuts_alone(trained: Pixels) -> None:
    names = [name for name, _ in offered(RNP(batch_size=20, share=0), copy.deepcopy(trained), bars(400))]
    assert names and not any("step" in name for name in names)
