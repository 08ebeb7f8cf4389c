from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from nab_defense.clean import CleanSet, Pixels
from nab_defense.purify.base import divergence
from nab_defense.purify.distill import Distill, layers_by_depth, reinitialise, shares
from nab_defense.purify.run import RADIUS
from nab_defense.runtime import Runtime
from tests.bars import bars
from tests.purify.offered import offered

CPU = Runtime(device="cpu", precision="float32")


def triggered(images: Tensor) -> Tensor:
    images = images.clone()
    images[:, :, -2:, -2:] = 255
    return images


@pytest.fixture(scope="module")
def backdoored() -> Pixels:
    """Takes an image with a bright corner for class 0."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels, width in ((1, 16), (16, 16)):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    network = Pixels(nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, 4)), [0.3], [0.25])
    clean = bars(800, seed=0, light=90)
    assert clean.labels is not None
    images, labels = torch.cat([clean.images, triggered(clean.images[:200])]), torch.cat([clean.labels, 0 * clean.labels[:200]])
    optimizer = torch.optim.SGD(network.parameters(), 0.02, 0.9)
    for rows in torch.cat([torch.randperm(1000) for _ in range(6)]).split(50):
        optimizer.zero_grad()
        F.cross_entropy(network(images[rows].float() / 255), labels[rows]).backward()
        optimizer.step()
    return network.requires_grad_(False).eval()


def accuracy_and_asr(network: nn.Module) -> tuple[float, float]:
    test = bars(400, seed=9, light=90)
    assert test.labels is not None
    network.eval()
    right = network(test.images.float() / 255).argmax(1) == test.labels
    others = test.labels != 0
    turned = network(triggered(test.images[others]).float() / 255).argmax(1) == 0
    return right.float().mean().item(), turned.float().mean().item()


def distilled(network: Pixels, clean: CleanSet, radius: float = RADIUS, **knobs: float) -> tuple[Pixels, list[str]]:
    method = Distill(steps=120, rounds=2, batch_size=64, **knobs)  # type: ignore[arg-type]
    network = copy.deepcopy(network)
    method.check(network, clean.images[:2].float() / 255)
    return network, [name for name, _ in offered(method, network, clean, radius=radius)]


def test_a_planted_backdoor_goes_and_the_skill_stays_without_labels(backdoored: Pixels) -> None:
    clean, radius = bars(400, seed=5, light=90), 20.0  # at 32 px; the corner is a change of about 1.8 here, where a 20 is 2.9
    before = accuracy_and_asr(backdoored)
    assert before[0] > 0.95 and before[1] > 0.95
    network, names = distilled(backdoored, CleanSet(clean.images, None, clean.pad, clean.hflip), radius=radius)
    accuracy, asr = accuracy_and_asr(network)
    assert names == ["step 90", "step 120"]
    assert accuracy > 0.95 and asr < 0.2
    published, _ = distilled(backdoored, clean, fraction=0.0)
    assert accuracy_and_asr(published)[1] > 0.9  # without perturbations it survives in so small a network
    again, _ = distilled(backdoored, CleanSet(clean.images, 3 - clean.labels, clean.pad, clean.hflip), radius=radius)  # type: ignore[operator]
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in network.state_dict().items())  # labels unread


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "convnext_atto", "efficientnet_lite0"])
def test_layers_come_by_depth_and_leave_out_what_is_no_weight(name: str) -> None:
    model = timm.create_model(name, num_classes=3, **({"img_size": 32} if name.startswith("vit") else {}))
    layers = layers_by_depth(model, torch.rand(2, 3, 32, 32))
    where = {module: path for path, module in model.named_modules()}
    assert layers[-1] is model.get_classifier()
    stem = "patch_embed" if name.startswith("vit") else "stem" if name == "convnext_atto" else "conv"
    assert where[layers[0]].startswith(stem)
    assert all(layer.weight.ndim >= 2 for layer in layers) and len(set(layers)) == len(layers)


def test_shares_grow_by_equal_factors_up_to_the_head() -> None:
    assert shares(5, 0.01, 0.27, 0.1) == pytest.approx([0.01, 0.03, 0.09, 0.27, 0.1])
    assert shares(2, 0.01, 0.27, 0.1) == pytest.approx([0.01, 0.1]) and shares(1, 0.01, 0.27, 0.1) == [0.1]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_reinitialise_redraws_that_share_from_the_weight_itself(share: float) -> None:
    weight = torch.randn(100, 50, generator=torch.Generator().manual_seed(0))
    old = weight.clone()
    reinitialise(weight, share, torch.Generator().manual_seed(1))
    assert (weight != old).float().mean().item() == pytest.approx(share, abs=0.02)
    assert set(weight.flatten().tolist()) <= set(old.flatten().tolist())
    assert weight.std().item() == pytest.approx(old.std().item(), rel=0.05)


def test_divergence_is_zero_where_answers_agree_and_its_gradient_keeps_its_size_when_softened() -> None:
    logits, wanted = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    assert divergence(wanted + 3, wanted, 2.0).item() == pytest.approx(0, abs=1e-6)
    own, theirs = (logits / 2).softmax(1), (wanted / 2).softmax(1)
    naive = 4 * (theirs * (theirs / own).log()).sum(1).mean()
    torch.testing.assert_close(divergence(logits, wanted, 2.0), naive)


def test_weights_that_follow_from_others_are_not_redrawn() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), weight_norm(nn.Conv2d(4, 6, 3)), nn.Flatten(), nn.Linear(96, 4))
    assert layers_by_depth(Pixels(network, [0.5], [0.25]), torch.rand(2, 1, 8, 8)) == [network[0], network[3]]


def test_a_network_without_weights_to_redraw_is_refused() -> None:
    with pytest.raises(ValueError, match="none"):
        Distill().check(Pixels(nn.Flatten(), [0.5], [0.25]), torch.rand(2, 1, 8, 8))
