"""Run by test_torchrun.py as one of two ranks: what ranks tell each other, deal out and train, left in the folder given."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nab_defense import ranks
from nab_defense.bench.evaluate import predict
from nab_defense.data import open_source
from nab_defense.io import save_json, save_state
from nab_defense.loaders import Loaders
from nab_defense.runtime import Runtime
from nab_defense.scan import scan_model
from nab_defense.stamp import Stamp
from nab_defense.train import TrainConfig, fit
from nab_defense.types import NABPlan

CPU = Runtime(device="cpu", precision="float32", threads=1, seed=3)
SOURCE = open_source("digits").subset(range(220))  # 15 is not a multiple of two, and 220 none of 50
CASES = {
    "plain": TrainConfig(epochs=2, batch_size=15, lr=0.05),
    "accumulated, clipped, averaged": TrainConfig(
        epochs=2, batch_size=15, lr=0.05, grad_accum_steps=2, clip_grad=0.5, model_ema=True, model_ema_decay=0.8
    ),
}


class Network(nn.Module):
    """Without BatchNorm, whose statistics know how a batch was split; with the two halves of a timm network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(144, 10)

    def forward_features(self, images: Tensor) -> Tensor:
        found: Tensor = self.body(images)
        return found

    def forward_head(self, stream: Tensor, pre_logits: bool = False) -> Tensor:
        return stream if pre_logits else self.head(stream)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


def loaders(size: int = 8) -> Loaders:
    return Loaders(size=size, mean=(0.306,), std=(0.376,), hflip=0.3, stamp=Stamp(), runtime=CPU)


def trained(train: TrainConfig) -> tuple[Network, list[dict[str, float]]]:
    network = Network()
    batches = loaders()(SOURCE, "crop_flip", train.batch_size, training=True, plan=NABPlan.empty(SOURCE.labels), split=True)
    return network, fit(network, batches, runtime=CPU, train=train, split=True)


def passes() -> list[np.ndarray]:
    """What ordered passes give, by images held in memory and by timm's loader."""
    found, network = [], Network().eval()
    for made, size in ((loaders(), 50), (loaders(), 55)):  # five batches, of which one rank has more, and four
        made.store.free = made.store.free if not found else 0
        batches = made(SOURCE, "none", size, training=False)
        seen = scan_model(network, batches, SOURCE.labels, runtime=CPU)
        found += [seen.losses, seen.features, predict(network, batches, CPU)]
    return found


def main(folder: Path) -> None:
    with ranks.joined():
        assert ranks.count() == 2
        me = ranks.rank()
        told = {"same": ranks.same(f"rank {me}"), "total": ranks.total(me, 0.5)}
        told["order"] = [t.tolist() for t in ranks.in_order([torch.full((i + 1,), 2 * i + me) for i in range(3 - me)])]
        told["first"] = ranks.on_first(lambda: [ranks.count(), ranks.leads(), me])
        timm = loaders()
        timm.store.free = 0
        torch.manual_seed(5)
        parts = [labels for _, labels in timm(SOURCE, "crop_flip", 15, training=True, split=True)]
        told["parts"] = [part.tolist() for part in parts]
        told["spoken"] = ranks.total(float(ranks.speaks()))
        results = {name: trained(train) for name, train in CASES.items()}
        weights = {name: network.state_dict() for name, (network, _) in results.items()}
        with Alone():
            save_json(folder / f"told{me}.json", told)
            save_state(folder / f"weights{me}.pt", {"weights": weights, "loss": [h[-1]["loss"] for _, h in results.values()]})
        arrays = [torch.from_numpy(array) for array in passes()]
        with Alone():
            save_state(folder / f"passes{me}.pt", {"passes": arrays})
        save_json(folder / "once.json", me)


class Alone:
    """So that each rank writes a file of its own."""

    def __enter__(self) -> None:
        self.here, ranks._here = ranks._here, ranks._Here()

    def __exit__(self, *error: object) -> None:
        ranks._here = self.here


if __name__ == "__main__":
    main(Path(sys.argv[1]))
