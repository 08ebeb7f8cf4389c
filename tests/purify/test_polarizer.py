"""The polarizer: an identity bit for bit, put where nothing bypasses it, and trained alone."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from nab_defense.clean import CleanSet, Pixels
from nab_defense.purify.polarizer import Polarizer, describe, install
from nab_defense.sites import last_cut
from tests.purify.offered import offered

# What the site is: the last block, or the last convolution of a plain body.
SITES = {
    "test_resnet": "layer4.0",
    "test_convnext": "stages.3.blocks.1",
    "test_efficientnet": "conv_head",
    "test_vit": "blocks.5",
    "test_nfnet": "final_conv",
    "test_byobnet": "stages.3.0",
}


@pytest.mark.parametrize(("name", "site"), SITES.items())
def test_site_and_identity(name: str, site: str) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=5).eval()
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        before = network(images)
    found = last_cut(network, images)
    assert found.name == site
    install(network, name=found.name, channels=found.channels, axis=found.axis)
    with torch.no_grad():
        assert torch.equal(network(images), before)
    assert describe(network) == {"name": site, "channels": found.channels, "axis": found.axis}


def test_no_gradient_goes_around_the_site() -> None:
    """With the polarizer's output forced to a constant, no image makes a difference."""
    network = timm.create_model("test_resnet", num_classes=5).eval()
    images = torch.rand(2, 3, 64, 64)
    site = last_cut(network, images)
    layer = install(network, name=site.name, channels=site.channels, axis=site.axis)
    with torch.no_grad():
        layer.difference.copy_(-torch.eye(site.channels))
        logits = network(images)
    torch.testing.assert_close(logits[0], logits[1])


def test_only_the_polarizer_changes() -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=3, in_chans=1).eval()
    clean = CleanSet(torch.randint(0, 256, (30, 1, 32, 32), dtype=torch.uint8), torch.arange(30) % 3)
    before = copy.deepcopy(network.state_dict())
    pixels = Pixels(network, [0.5], [0.25])
    made = list(offered(Polarizer(steps=4, rounds=2, batch_size=10), pixels, clean))
    assert [name for name, _ in made] == ["step 3", "step 4"]
    after = {name.replace(".module.", "."): tensor for name, tensor in network.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    moved = [name for name in after if name not in before]
    assert len(moved) == 2 and all(after[name].abs().max() > 0 for name in moved)
