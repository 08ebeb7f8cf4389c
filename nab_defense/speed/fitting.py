"""Training and inference, beside timm's loader and a plain loop, and beside the bare data set and the bare model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from ..checkpoint import Network
from ..data import Source, open_source
from ..defended import DefendedModel
from ..loaders import Loaders
from ..runtime import Runtime, fixed_seed
from ..stamp import Stamp
from ..train import TrainConfig, fit
from ..types import NABPlan
from .timing import peak_memory, seconds, side_by_side, spread

__all__ = ["compiled", "defended", "small_network", "training", "training_224", "wrapper"]

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
CLASSES = 10
# What timm's loop runs as: like ours, and step by step as timm's train script does where it is told nothing.
TIMMS = {
    "same_layout": Runtime(device="cpu"),
    "timm_layout": Runtime(device="cpu", channels_last=False),
    "timm_script": Runtime(device="cpu", channels_last=False, precision="float32"),
}
SMALL_NETWORK: dict[str, Any] = {"stem_type": "deep", "stem_width": 8, "channels": [16, 32, 64, 128], "avg_down": False}
ONE_EPOCH: dict[str, Any] = {"opt": "sgd", "lr": 0.01, "weight_decay": 5e-4, "momentum": 0.9}


def small_network(channels: int = 3, *, small_stem: bool = True) -> nn.Module:
    """The network of `nab scan`, the same weights every time."""
    fixed_seed(0)
    return Network("resnet10t", CLASSES, channels, small_stem, False, SMALL_NETWORK).build()


@contextmanager
def image_folder(count: int, edge: int) -> Iterator[Path]:
    """A folder of smooth PNG images, one sub-folder a class, each a quarter its class's picture: noise would take longer to read
    than photographs do, and nothing could be learned from it."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 64, (CLASSES, 8, 8, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as name:
        for index in range(count):
            folder = Path(name) / f"c{index % CLASSES}"
            folder.mkdir(exist_ok=True)
            coarse = Image.fromarray(pictures[index % CLASSES] + rng.integers(0, 192, (8, 8, 3), dtype=np.uint8))
            coarse.resize((edge, edge), Image.Resampling.BICUBIC).save(folder / f"{index:05d}.png")
        yield Path(name)


def _ours(
    source: Source,
    augment: str,
    *,
    size: int,
    batch_size: int,
    plan: NABPlan | None = None,
    runtime: Runtime = TIMMS["same_layout"],
) -> Callable[[], object]:
    """One epoch by our loader and fit()."""
    loaders = Loaders(size=size, mean=MEAN, std=STD, hflip=0.5, stamp=Stamp(), runtime=runtime)
    loader = loaders(source, augment, batch_size, training=True, plan=plan)
    network = small_network(small_stem=size <= 64)
    settings = TrainConfig(epochs=1, batch_size=batch_size, sched="none", **ONE_EPOCH)
    return lambda: fit(network, loader, runtime=runtime, train=settings)


def _timms(folder: Path, *, size: int, batch_size: int, runtime: Runtime, color_jitter: Any) -> Callable[[], object]:
    """One epoch by timm's data set and loader in a loop as plain as can be."""
    network = runtime.place(small_network(small_stem=size <= 64))
    loader = create_loader(
        create_dataset("", str(folder)), (3, size, size), batch_size, is_training=True, mean=MEAN, std=STD, num_workers=0,
        color_jitter=color_jitter, device=torch.device("cpu"), pin_memory=False, persistent_workers=False,
    )  # fmt: skip
    optimizer = create_optimizer_v2(network, **ONE_EPOCH)

    def epoch() -> None:
        network.train()
        for images, labels in loader:
            with runtime.autocast():
                logits = network(runtime.put(images))
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def _training(*, count: int, size: int, augment: str, jitter: float | None, batch_size: int, repeats: int) -> dict[str, Any]:
    with image_folder(count, size) as folder:
        given: dict[str, Any] = {"size": size, "batch_size": batch_size}
        ours = _ours(open_source(str(folder)), augment, **given)
        found = {}
        for name, runtime in TIMMS.items():
            timms = _timms(folder, runtime=runtime, color_jitter=jitter, **given)
            found[name] = side_by_side(("timm", timms), ("ours", ours), repeats=repeats)
        # From the files on, as what is held of them counts.
        whole: dict[str, Callable[[], object]] = {
            "timm": lambda: _timms(folder, runtime=TIMMS["same_layout"], color_jitter=jitter, **given)(),
            "ours": lambda: _ours(open_source(str(folder)), augment, **given)(),
        }
        peak = {name: peak_memory(task)[1] for name, task in whole.items()}
    settings = {"images": count, **given, "augment": augment, "color_jitter": jitter, "workers": 0, "repeats": repeats}
    what = "seconds of one epoch: above 1 ours is faster; MB that it takes at its peak"
    return {"what": what, "settings": settings, **found, "peak_mb": peak}


def training(*, count: int = 1024, size: int = 32, batch_size: int = 128, repeats: int = 5) -> dict[str, Any]:
    """fit() on images held in memory, crop and flip, against timm's loader, random resized crop and flip without color jitter,
    and a plain loop; with the same memory layout, with that of timm's train script, and with its precision, too."""
    return _training(count=count, size=size, augment="crop_flip", jitter=None, batch_size=batch_size, repeats=repeats)


def training_224(*, count: int = 96, size: int = 224, batch_size: int = 32, repeats: int = 3) -> dict[str, Any]:
    """The same where ours goes through timm's loader too, with timm's own augmentation on both sides."""
    return _training(count=count, size=size, augment="timm", jitter=0.4, batch_size=batch_size, repeats=repeats)


def compiled(*, count: int = 512, size: int = 32, batch_size: int = 128, repeats: int = 5) -> dict[str, Any]:
    """fit() as it is over fit() with torch.compile, and what the first step costs then: the first epoch, less a later one."""
    with image_folder(count, size) as folder:
        source = open_source(str(folder))
        given: dict[str, Any] = {"size": size, "batch_size": batch_size}
        plain, swift = (_ours(source, "crop_flip", **given, runtime=Runtime(device="cpu", compile=c)) for c in (False, True))
        found = side_by_side(("plain", plain), ("compiled", swift), repeats=repeats)
    first = found["first_run"]["compiled"] - float(np.median(found["seconds"]["compiled"]))
    settings = {"images": count, **given, "repeats": repeats}
    what = "seconds of one epoch: above 1 compiling pays"
    return {"what": what, "settings": settings, "epoch": found, "first_step_seconds": first}


def some_plan(labels: np.ndarray) -> NABPlan:
    """A tenth of the samples relabelled and stamped."""
    suspect = np.arange(len(labels)) % 10 == 0
    new = np.where(suspect, (labels + 1) % CLASSES, labels)
    empty = NABPlan.empty(labels)
    return NABPlan(labels, new, suspect, empty.keep, empty.cover)


def wrapper(*, count: int = 1024, size: int = 32, batch_size: int = 128, repeats: int = 7) -> dict[str, Any]:
    """A plan over none: reading by timm's loader (NABDataset over the bare data set), from memory, and training from memory."""
    runtime, found = Runtime(device="cpu"), {}
    with image_folder(count, size) as folder:
        source = open_source(str(folder))
        plan = some_plan(source.labels)
        for name in ("loader", "resident"):
            loaders = Loaders(size=size, mean=MEAN, std=STD, hflip=0.5, stamp=Stamp(), runtime=runtime)
            if name == "loader":
                loaders.store.free = 0  # without room the images are left to timm's loader
            plain, planned = (loaders(source, "crop_flip", batch_size, training=True, plan=which) for which in (None, plan))
            found[name] = side_by_side(("plan", partial(_pass, planned)), ("none", partial(_pass, plain)), repeats=repeats)
        train = partial(_ours, source, "crop_flip", size=size, batch_size=batch_size)
        found["training"] = side_by_side(("plan", train(plan=plan)), ("none", train()), repeats=repeats)
    settings = {"images": count, "size": size, "batch_size": batch_size, "repeats": repeats}
    return {"what": "seconds of one epoch with a plan over one without", "settings": settings, **found}


def _pass(loader: Any) -> None:
    for _ in loader:
        pass


def defended(
    *, count: int = 1024, size: int = 32, batch_size: int = 256, repeats: int = 21, patience: float = 120
) -> dict[str, Any]:
    """Inference by DefendedModel over the bare model, on the same normalised images: a small network, and a ResNet-18. The ratio
    is mostly noise; what the stamping alone takes, as a share of the bare model's seconds, is less so."""
    runtime, found = Runtime(device="cpu"), {}
    generator = torch.Generator().manual_seed(0)
    images = [runtime.put(torch.randn(batch_size, 3, size, size, generator=generator)) for _ in range(count // batch_size)]

    @torch.inference_mode()
    def each(work: Callable[[Tensor], Tensor]) -> None:
        for batch in images:
            with runtime.autocast():
                work(batch)

    for name, network in (("small", small_network()), ("resnet18", Network("resnet18", CLASSES, 3, True, False, {}).build())):
        bare = runtime.place(network).eval()
        shipped = DefendedModel(bare, Stamp(), mean=MEAN, std=STD).eval()
        two = ("defended", partial(each, shipped)), ("bare", partial(each, bare))
        found[name] = side_by_side(*two, repeats=repeats, patience=patience)
        found[name]["stamp_share"] = spread(
            [seconds(partial(each, shipped.paint)) / one for one in found[name]["seconds"]["bare"]]
        )
    settings = {"images": count, "size": size, "batch_size": batch_size, "repeats": repeats, "patience": patience}
    return {"what": "seconds of inference, stamped over bare", "settings": settings, **found}
