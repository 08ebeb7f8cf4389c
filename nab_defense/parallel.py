"""Training over several ranks: each takes its part of every batch, and DistributedDataParallel averages the gradients."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import ranks
from .runtime import Runtime, fixed_seed

__all__ = ["Replica"]


class Replica:
    """A network in training, as one of several ranks that train it; in a single process just the network.

    Args:
        model: Weights and statistics are its own from beginning to end.
        runtime: Device, compilation, BatchNorm.
        split: Ranks take parts of each batch; otherwise all train alike on whole batches, and rank 0's weights count.
    """

    def __init__(self, model: nn.Module, runtime: Runtime, *, split: bool) -> None:
        self.runtime, self.split = runtime, split and ranks.count() > 1
        self.forward: Any = model
        self.size = 0.0
        if self.split:
            device, known = runtime.torch_device, signature(DistributedDataParallel).parameters
            # Buffers are not sent in every step, see settle; newer versions of torch warn of the older name.
            buffers: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
            self.forward = self.averaging = DistributedDataParallel(
                _synchronised(model) if runtime.sync_bn else model,
                device_ids=[device] if device.type == "cuda" else None,
                **buffers,
            )
        if runtime.compile:
            self.forward = torch.compile(self.forward)

    def begin(self, epoch: int, images: int) -> None:
        """To be called with this rank's number of images in an epoch's first batch; all batches are of one size.

        What the network drops is drawn anew on each rank, which would all drop alike otherwise."""
        if self.split:
            self.averaging.train()
            (self.size,) = ranks.total(images)
            fixed_seed(self.runtime.seed, epoch, ranks.rank())

    def weight(self, images: int) -> float:
        """What a part's mean loss counts, so that the average over the ranks is the mean over the batch."""
        return images * ranks.count() / self.size if self.split else 1.0

    def holding(self, back: bool) -> AbstractContextManager[None]:
        """Where gradients are held back for a later batch of the same update, nothing is sent."""
        return self.averaging.no_sync() if self.split and back else nullcontext()

    def total(self, *values: float) -> list[float]:
        """Sums over the ranks, where each saw its part."""
        return ranks.total(*values) if self.split else list(values)

    def settle(self, *networks: nn.Module) -> None:
        """Make the ranks' networks one after an epoch: BatchNorm's statistics are averaged, as timm does; the rest is rank 0's.

        That is once an epoch and not once a step, as nothing reads the statistics in between."""
        for network in networks:
            if self.split:
                distribute_bn(network, ranks.count(), reduce=True)
            ranks.share(network)


def _synchronised(model: nn.Module) -> nn.Module:
    """A network of the same tensors whose BatchNorm takes the images of all ranks; the one given keeps its layers."""
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin: nn.Module = convert_sync_batchnorm(copy.deepcopy(model, kept))
    return twin
