"""Image pipelines by name; each turns a PIL image into a uint8 CHW tensor, which the loader normalises on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms as tv

from .distort import Distortion

__all__ = ["AUGMENTATIONS", "RESIZED", "VARIED", "LessDetail", "build_transform", "crop_padding", "resized"]

Transform = Callable[[Any], Tensor]
# Augmentations that first bring the whole image to its size, always alike, and how.
RESIZED = {"none": tv.InterpolationMode.BICUBIC, "crop_flip": tv.InterpolationMode.BILINEAR}
COARSE = 0.4  # of an image's edge


def resized(augment: str, size: int) -> Transform:
    """What an augmentation of RESIZED makes of an image before it draws anything: all of it at this size, squashed where it is
    not square; images already of that size pass as they are.

    Never a center crop, as timm evaluates: a trigger in the corner would be cut off, unseen by the scan and the measurements,
    while training, whose random crops reach every border, learns it."""
    return tv.Compose([tv.Resize((size, size), RESIZED[augment]), tv.PILToTensor()])


def crop_padding(size: int) -> int:
    """Pixels of zeros around an image of this size before crop_flip crops it."""
    return size // 8


def _crop_flip(size: int, pad: int, hflip: float, distortion: Distortion) -> Transform:
    """Random crop from a zero-padded image and horizontal flip, the usual augmentation of small images, and what is to follow."""
    resize = tv.Resize((size, size), RESIZED["crop_flip"])
    return tv.Compose([
        resize, tv.RandomCrop(size, padding=pad), tv.RandomHorizontalFlip(hflip), tv.PILToTensor(), distortion.one
    ])  # fmt: skip


class Albumentation:
    """Random resized crop, flip, color jitter and coarse dropout of albumentations 2.0, seeded from torch.

    Albumentations keeps generators of its own, which forked loader workers would share; each call reseeds them from
    torch's, so that a run repeats bit for bit with any number of workers."""

    def __init__(self, size: int, hflip: float) -> None:
        import albumentations as A

        self.compose = A.Compose([
            A.RandomResizedCrop(size=(size, size), scale=(0.35, 1.0)),
            A.HorizontalFlip(p=hflip),
            A.ColorJitter(p=0.5),
            A.CoarseDropout(num_holes_range=(1, 1), hole_height_range=(0.1, 0.25), hole_width_range=(0.1, 0.25), p=0.25),
        ])  # fmt: skip

    def __call__(self, image: Any) -> Tensor:
        self.compose.set_random_seed(int(torch.randint(2**31, ())))
        array = self.compose(image=np.array(image))["image"]
        return torch.from_numpy(np.ascontiguousarray(array if array.ndim == 3 else array[..., None])).permute(2, 0, 1)


class LessDetail:
    """Half of the images are shrunk, to COARSE of their edge at least, and enlarged again; drawn from torch."""

    def __call__(self, image: Any) -> Any:
        shrink, share = torch.rand(2).tolist()
        if shrink < 0.5:
            return image
        size = image.size
        small = tuple(max(2, round(edge * (COARSE + (1 - COARSE) * share))) for edge in size)
        return image.resize(small, Image.Resampling.BILINEAR).resize(size, Image.Resampling.BILINEAR)


AUGMENTATIONS = ("none", "crop_flip", "timm", "albumentations")
VARIED = "varied"  # of networks that tell content whatever was done to the whole image; no recipe's


def build_transform(
    augment: str,
    size: int,
    *,
    hflip: float = 0.5,
    crop_pad: int | None = None,
    distortion: Distortion = Distortion(),  # noqa: B008  # it is frozen
) -> Transform:
    """A pipeline from PIL image to (C, size, size) uint8.

    Args:
        augment: "none" (evaluation and scan: the whole image), "crop_flip" (small images), "timm" (timm's random resized
            crop, flip and color jitter), "albumentations", or VARIED (TrivialAugment [Müller and Hutter 2021,
            arXiv:2103.10158], which leaves all detail, then LessDetail and crop_flip).
        size: Edge in pixels.
        hflip: Probability of a horizontal flip.
        crop_pad: Padding of crop_flip; None: size / 8.
        distortion: What crop_flip does to images besides.

    Raises:
        ValueError: Unknown name.
    """
    if augment == "none":
        return resized(augment, size)
    if augment == "crop_flip":
        return _crop_flip(size, crop_padding(size) if crop_pad is None else crop_pad, hflip, distortion)
    if augment == VARIED:
        return tv.Compose([tv.TrivialAugmentWide(), LessDetail(), _crop_flip(size, crop_padding(size), hflip, distortion)])
    if augment == "timm":
        made = create_transform(size, is_training=True, use_prefetcher=True, hflip=hflip)
        return tv.Compose([*made.transforms, torch.as_tensor])  # older timm ends in an array
    if augment == "albumentations":
        return Albumentation(size, hflip)
    raise ValueError(f"no augmentation {augment!r}; known: {', '.join(AUGMENTATIONS)}")
