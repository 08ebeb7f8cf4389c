"""What a network and images must be like before anything is done with them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...clean import CleanSet, Pixels, logits_of
from ...runtime import Runtime

__all__ = ["answers", "count_outputs"]


def answers(network: Pixels, clean: CleanSet, runtime: Runtime) -> Tensor:
    """The logits (N, K) of the clean images; ValueError where some are not finite, by which nothing could be judged."""
    logits = logits_of(network, clean, runtime)
    broken = int((~logits.isfinite().all(1)).sum())
    if broken:
        raise ValueError(
            f"the model's logits of {broken} of the {len(clean)} clean images are not finite; check mean and std,"
            " or compute with runtime.precision=float32"
        )
    return logits


def count_outputs(network: Pixels, images: Tensor, runtime: Runtime) -> int:
    """How many classes a network tells apart, found by running it.

    Args: images: a few, (B, C, H, W) uint8.

    Raises:
        ValueError: Images, normalisation, weights or output that no method could use."""
    if images.ndim != 4 or images.dtype != torch.uint8 or len(images) == 0:
        raise ValueError(f"clean images must be (N, C, H, W) uint8, N above 0, got {tuple(images.shape)} {images.dtype}")
    shape = "x".join(map(str, images.shape[1:]))
    for name in ("mean", "std"):
        values = network.get_buffer(name).flatten().tolist()
        if len(values) != images.shape[1]:
            raise ValueError(f"{name} has {len(values)} values, the images have {images.shape[1]} channels")
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{name} must be finite, got {values}")
        if name == "mean" and not 0 <= min(values) <= max(values) <= 1:
            raise ValueError(f"mean is of pixels in [0, 1], got {values}; divide by 255")
        if name == "std" and not all(value > 0 for value in values):
            raise ValueError(f"std must be positive, got {values}; for raw [0, 1] input it is 1")
    weights = network.get_submodule("model").state_dict()
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"the model's {broken[0]} holds values that are not finite ({len(broken)} such tensors); it cannot work")
    try:
        logits = logits_of(network, CleanSet(images), runtime)
    except Exception as error:  # forward passes raise anything
        raise ValueError(f"the model cannot take {shape} images: {' '.join(str(error).split())[:200]}") from error
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"the model gives {tuple(logits.shape)} for {len(images)} images, expected (images, classes)")
    return logits.shape[1]
