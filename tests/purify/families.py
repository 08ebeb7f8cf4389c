"""A tiny network of each family that the purifiers are to serve, for 32-px colour images."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from timm.models.vgg import VGG
from torch import nn

FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "residual": lambda **k: timm.create_model("test_resnet", **k),
    "pre-activation": lambda **k: timm.create_model("resnetv2_18", channels=[16, 32, 64, 64], stem_chs=16, **k),
    "convnext": lambda **k: timm.create_model("test_convnext", **k),
    "efficientnet": lambda **k: timm.create_model("test_efficientnet", **k),
    "mobilenet": lambda **k: timm.create_model("mobilenetv3_small_050", **k),
    "regnet": lambda **k: timm.create_model("regnetx_002", **k),
    "vgg": lambda **k: VGG([16, "M", 32, "M", 64, 64, "M", 128, "M"], mlp_ratio=0.02, norm_layer=nn.BatchNorm2d, **k),
    "nfnet": lambda **k: timm.create_model("test_nfnet", **k),
    "vit": lambda **k: timm.create_model("test_vit", img_size=32, patch_size=4, **k),
    "swin": lambda **k: timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=24,
        depths=(1, 2, 1),
        num_heads=(2, 4, 8),
        **k,
    ),
    "mixer": lambda **k: MlpMixer(img_size=32, patch_size=4, embed_dim=64, num_blocks=4, **k),
}

# Method and family that are refused at the start: clp where no convolution is followed by batch normalisation, and exact second
# derivatives of hard sigmoids.
REFUSED = {*(("clp", name) for name in ("convnext", "nfnet", "vit", "swin", "mixer")), ("ibau exact", "mobilenet")}


def family(name: str, classes: int) -> nn.Module:
    """A fresh network, always the same."""
    torch.manual_seed(0)
    return FAMILIES[name](num_classes=classes).eval()
