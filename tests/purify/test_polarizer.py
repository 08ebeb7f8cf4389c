"""The polarizer: an identity bit for bit, put where nothing bypasses it, and trained alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, astuple
from pathlib import Path

import pytest
import timm
import torch
from timm.models.nest import Nest
from torch import Tensor, nn

from nab_defense import checkpoint
from nab_defense.checkpoint import Network
from nab_defense.clean import CleanSet, Pixels
from nab_defense.purify import purify
from nab_defense.purify.base import choice, judge
from nab_defense.purify.polarizer import Polarized, Polarizer, describe, install
from nab_defense.runtime import Runtime
from nab_defense.sites import last_cut
from tests.purify.families import family
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


FAMILY_SITES = {
    "residual": ("layer4.0", 192, 1),
    "pre-activation": ("stages.3.blocks.0", 64, 1),
    "convnext": ("stages.3.downsample.1", 48, 1),
    "efficientnet": ("blocks.4.0.conv_dw", 192, 1),
    "mobilenet": ("blocks.4.0.conv_dw", 144, 1),
    "regnet": ("s4.b1", 152, 1),
    "vgg": ("pre_logits.fc1", 128, 1),
    "nfnet": ("stages.3.0", 96, 1),
    "vit": ("blocks.5", 64, -1),
    "swin": ("layers.2.blocks.0", 96, -1),
    "mixer": ("blocks.3", 64, -1),
}


@pytest.mark.parametrize(("name", "site"), FAMILY_SITES.items())
def test_site_of_each_family(name: str, site: tuple[str, int, int]) -> None:
    assert astuple(last_cut(family(name, 5), torch.rand(2, 3, 32, 32))) == site


def nest() -> nn.Module:
    """Whose stream is (B, blocks, N, C)."""
    width = {"embed_dims": (24, 48, 96), "num_heads": (1, 2, 4), "depths": (1, 1, 2)}
    return Nest(num_classes=5, img_size=32, patch_size=2, **width)


def swin() -> nn.Module:
    """Whose stream is (B, H, W, C), H and W not the same."""
    width = {"embed_dim": 24, "depths": (1, 2, 1), "num_heads": (2, 4, 8)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, img_size=(32, 64), window_size=2, **width)


@pytest.mark.parametrize(
    ("made", "width", "name"), [(nest, 32, "levels.2.transformer_encoder.1"), (swin, 64, "layers.2.blocks.0")]
)
def test_channels_come_last_where_the_layers_of_the_block_say_so(made: Callable[[], nn.Module], width: int, name: str) -> None:
    torch.manual_seed(0)
    assert astuple(last_cut(made().eval(), torch.rand(2, 3, 32, width))) == (name, 96, -1)


class Cube(nn.Module):
    """Of a (B, 8, 8, 8) stream nobody can tell which axis holds its channels, but for a layer that is given it as it is."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        self.norm, self.mix, self.flat = nn.LayerNorm(8), nn.Linear(8, 8), flat

    def forward(self, stream: Tensor) -> Tensor:
        normed = self.norm(stream)
        return stream + self.mix(normed.flatten(1, 2) if self.flat else normed).view_as(stream)


@pytest.mark.parametrize("flat", [False, True])
def test_an_axis_that_nothing_tells_is_refused(flat: bool) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), Cube(flat=flat), nn.Flatten(), nn.Linear(512, 4)).eval()
    if flat:
        with pytest.raises(ValueError, match=r"^nothing tells which axis of \(2, 8, 8, 8\), the input of 1, holds the channels$"):
            last_cut(network, torch.rand(2, 3, 8, 8))
    else:
        assert last_cut(network, torch.rand(2, 3, 8, 8)).axis == -1


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "vit_relpos_small_patch16_224"])
def test_blocks_that_are_called_with_more_than_their_stream(name: str) -> None:
    torch.manual_seed(0)
    width = {"embed_dim": 48, "num_heads": 2, "depth": 2}
    network = timm.create_model(name, num_classes=5, img_size=28 if "eva" in name else 32, **width).eval()
    images = torch.rand(2, 3, *network.patch_embed.img_size)
    found = last_cut(network, images)
    assert found.name == "blocks.1"
    with torch.no_grad():
        before = network(images)
        install(network, name=found.name, channels=found.channels, axis=found.axis)
        assert torch.equal(network(images), before)


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


def noise() -> CleanSet:
    pixels = torch.randint(0, 256, (60, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    return CleanSet(pixels.to(torch.uint8), torch.arange(60) % 3)


def test_only_the_polarizer_changes() -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=3, in_chans=1).eval()
    clean = noise()
    before = copy.deepcopy(network.state_dict())
    pixels = Pixels(network, [0.5], [0.25])
    made = list(offered(Polarizer(steps=4, rounds=2, batch_size=10), pixels, clean))
    assert [name for name, _ in made] == ["step 3", "step 4"]
    after = {name.replace(".module.", "."): tensor for name, tensor in network.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    moved = [name for name in after if name not in before]
    assert len(moved) == 2 and all(after[name].abs().max() > 0 for name in moved)


def test_what_was_fixed_stays_fixed_behind_the_polarizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "LEAST_GAIN", -1.0)
    monkeypatch.setattr(judge, "PROBES", 1)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3, in_chans=1).eval()
    model.layer4.requires_grad_(False)
    given = {"mean": (0.5,), "std": (0.25,), "runtime": Runtime(device="cpu", threads=1), "max_drop": 0.99}
    found = purify(model, noise(), Polarizer(steps=1, rounds=1, batch_size=10), **given)
    assert found.status == "accepted"
    trainable = {name.replace(".module.", "."): param.requires_grad for name, param in found.model.named_parameters()}
    for name, param in model.named_parameters():
        assert trainable.pop(name) is param.requires_grad is (not name.startswith("layer4."))
    assert trainable == {"layer4.0.difference": True, "layer4.0.bias": True}


def test_a_polarizer_that_is_there_is_trained_on_and_loads_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    about = Network("test_resnet", 3, 1)
    network = about.build().eval()
    images = noise().images.float() / 255
    layer = install(network, **asdict(last_cut(network, images)))
    with torch.no_grad():
        layer.difference.normal_(std=0.1)
    pixels, start = Pixels(network, [0.0], [1.0]), layer.difference.detach().clone()
    list(offered(Polarizer(steps=2, rounds=1, batch_size=10), pixels, noise()))
    assert [module for module in network.modules() if isinstance(module, Polarized)] == [layer]
    assert 0 < (layer.difference - start).abs().max() < 0.01  # from where it was, two steps of at most lr
    checkpoint.save(tmp_path / "model.safetensors", network, about, mean=[0.0], std=[1.0])
    with torch.no_grad():
        assert torch.equal(checkpoint.load(tmp_path)(images), network.eval()(images))
