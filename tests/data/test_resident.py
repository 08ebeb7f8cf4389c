"""Batches from images held on the device: those of timm's loader bit for bit, and each augmentation by its law."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision import transforms as tv

from nab_defense.clean import crop_flip
from nab_defense.data import ResidentLoader, Source, Store, build_loader, build_transform, open_source
from nab_defense.data.distort import Distortion, distorted
from nab_defense.data.resident import draw_crop_flip
from nab_defense.dataset import NABDataset
from nab_defense.runtime import Runtime
from nab_defense.stamp import Stamp
from nab_defense.train import TrainConfig, fit
from nab_defense.types import NABPlan

CPU = Runtime(device="cpu", precision="float32")
STAMP = Stamp(value="noise", seed=4)
NORMAL = {1: ((0.3,), (0.2,)), 3: ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))}


def colored(count: int = 70, edge: int = 16) -> Source:
    """Random images in color, of three classes."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (count, edge, edge, 3), dtype=np.uint8)
    source = open_source("digits").subset(range(count))
    load: Any = lambda index: Image.fromarray(pixels[index])  # noqa: E731
    labels, names = np.arange(count) % 3, ("a", "b", "c")
    return Source("colored", names, labels, source.ids, load, "RGB", "f" * 64, {})


def digits() -> Source:
    return open_source("digits").subset(range(0, 140, 2))


def busy_plan(labels: NDArray[np.int64]) -> NABPlan:
    """Suspects with a new label and with their own, covers, dropped samples among all of these."""
    turn = np.arange(len(labels)) % 11
    suspect = turn < 4
    new = np.where(turn < 2, (labels + 1) % 3, labels)
    return NABPlan(labels, new, suspect, ~np.isin(turn, [1, 3, 6]), turn == 5)


def resident(source: Source, runtime: Runtime = CPU, plan: NABPlan | None = None, **knobs: Any) -> ResidentLoader:
    mean, std = NORMAL[source.channels]
    found = Store(knobs.pop("size", source.edge()), runtime.torch_device).find(source, knobs["augment"])
    assert found is not None
    return ResidentLoader(source, *found, mean=mean, std=std, runtime=runtime, stamp=STAMP, plan=plan, **knobs)


def timms(source: Source, plan: NABPlan | None, *, augment: str, size: int, hflip: float = 0.5, **knobs: Any) -> Any:
    mean, std = NORMAL[source.channels]
    view: Any = source.view() if plan is None else NABDataset(source.view(), plan, STAMP, mean=mean, std=std)
    transform = build_transform(augment, size, hflip=hflip)
    return build_loader(view, transform, size=size, mean=mean, std=std, runtime=CPU, **knobs)


def walked(loader: Any, seed: int = 5) -> list[Tensor]:
    """Two passes under a seed, with what a network that drops units would draw between the batches."""
    torch.manual_seed(seed)
    found = []
    for _ in range(2):
        for images, labels in loader:
            assert images.dtype == torch.float32 and labels.dtype == torch.int64
            found += [images, labels, torch.rand(3)]
    return found


@pytest.mark.parametrize("planned", [False, True], ids=["plain", "planned"])
@pytest.mark.parametrize("training", [False, True], ids=["ordered", "training"])
@pytest.mark.parametrize("augment", ["none", "crop_flip"])
@pytest.mark.parametrize("size", [None, 12, 40], ids=["own size", "shrunk", "enlarged"])
@pytest.mark.parametrize("make", [colored, digits])
def test_batches_are_those_of_timms_loader(make: Any, size: int | None, augment: str, training: bool, planned: bool) -> None:
    source = make()
    plan = busy_plan(source.labels) if planned else None
    knobs = {"augment": augment, "training": training, "hflip": 0.3, "batch_size": 16, "size": size or source.edge()}
    ours, theirs = resident(source, plan=plan, **knobs), timms(source, plan, **knobs)
    kept = len(source) if plan is None else int(plan.keep.sum())
    assert len(ours) == len(theirs) == (kept // 16 if training else -(-kept // 16))
    pairs = list(zip(walked(ours), walked(theirs), strict=True))
    assert len(pairs) == 6 * len(ours) and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("distortion", [Distortion(0.4), Distortion(erase=0.6), Distortion(0.3, 1.0)])
def test_distorted_after_crop_and_flip_and_before_the_stamp(distortion: Distortion) -> None:
    source, (mean, std) = colored(), NORMAL[3]
    plan, knobs = busy_plan(source.labels), {"augment": "crop_flip", "batch_size": 70, "hflip": 0.3}
    torch.manual_seed(2)
    images, labels = next(iter(resident(source, plan=plan, distortion=distortion, **knobs)))
    torch.manual_seed(2)
    picks = torch.from_numpy(np.flatnonzero(plan.keep))
    pixels = torch.stack([torch.from_numpy(source.pixels(int(i)).copy()).permute(2, 0, 1) for i in picks])
    torch.empty((), dtype=torch.int64).random_()  # the seed that torch's loader takes for its processes
    shifted = crop_flip(pixels, 2, *draw_crop_flip(len(picks), pad=2, hflip=0.3))
    expected = distorted(shifted.clone(), *distortion.draw(len(picks), 16))
    assert not torch.equal(expected, shifted)
    stamped = torch.from_numpy(plan.stamped[plan.keep])
    expected[stamped] = STAMP(expected[stamped], mean=mean)
    scaled = [255 * torch.tensor(values).view(-1, 1, 1) for values in (mean, std)]
    torch.testing.assert_close(images, (expected.float() - scaled[0]) / scaled[1], rtol=0, atol=1e-6)
    assert labels.tolist() == plan.new_labels[plan.keep].tolist()


def test_batches_read_for_evaluation_are_never_distorted() -> None:
    plain, other = (resident(digits(), augment="none", batch_size=16, distortion=d) for d in (Distortion(), Distortion(1.0, 1.0)))
    assert all(torch.equal(a, b) for a, b in zip(walked(plain), walked(other), strict=True))


def test_image_by_image_everything_is_distorted_before_the_stamp_too() -> None:
    source, (mean, std) = colored(), NORMAL[3]
    plan = busy_plan(source.labels)
    transform = build_transform("crop_flip", 16, distortion=Distortion(erase=1.0))
    view = NABDataset(source.view(transform), plan, STAMP, mean=mean, std=std)
    kept, (rows, cols) = np.flatnonzero(plan.keep), STAMP.region(16, 16)
    wanted = STAMP(torch.zeros(3, 16, 16, dtype=torch.uint8), mean=mean)[:, rows, cols]
    for place, index in enumerate(kept):
        image, _ = view[place]
        assert image.dtype == torch.uint8 and ((image == 0).all(0).sum() >= 3)
        assert torch.equal(image[:, rows, cols], wanted) == bool(plan.stamped[index])


def test_a_small_training_set_is_one_batch_and_another_one_drops_the_rest() -> None:
    source = digits()
    for batch, sizes in ((100, [70]), (40, [40])):
        loader = resident(source, augment="crop_flip", training=True, batch_size=batch)
        assert [len(labels) for _, labels in loader] == sizes


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_batches_have_the_runtimes_layout(augment: str, channels_last: bool) -> None:
    runtime = Runtime(device="cpu", channels_last=channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for images, _ in resident(colored(), runtime, busy_plan(colored().labels), augment=augment, batch_size=32):
        assert images.is_contiguous(memory_format=layout)
        assert runtime.put(images).data_ptr() == images.data_ptr()  # nothing is left to do for fit


def test_the_stamp_comes_last_and_stands_still() -> None:
    source = colored()
    plan = busy_plan(source.labels)
    loader = resident(source, plan=plan, augment="crop_flip", batch_size=70)
    images, labels = next(iter(loader))
    mean, std = NORMAL[3]
    rows, cols = STAMP.region(16, 16)
    wanted = STAMP(torch.zeros(3, 16, 16), mean=mean, std=std, normalized=True)[:, rows, cols]
    level = 1 / 255 / torch.tensor(std).view(-1, 1, 1)
    near = ((images[:, :, rows, cols] - wanted).abs() <= level).flatten(1).all(1)
    assert near.tolist() == plan.stamped[plan.keep].tolist() and labels.tolist() == plan.new_labels[plan.keep].tolist()


def test_crop_flip_equals_one_image_after_the_other() -> None:
    images, count, pad = torch.randint(0, 256, (50, 3, 9, 7), dtype=torch.uint8), 50, 3
    top, left, flip = *torch.randint(0, 2 * pad + 1, (2, count)), torch.rand(count) < 0.5
    made = crop_flip(images, pad, top, left, flip)
    for index in range(count):
        y, x = int(top[index]), int(left[index])
        expected = F.pad(images[index], (pad,) * 4)[:, y : y + 9, x : x + 7]
        assert torch.equal(made[index], expected.flip(2) if flip[index] else expected)
    still = torch.full((count,), pad)
    assert torch.equal(crop_flip(images, pad, still, still, torch.zeros(count, dtype=torch.bool)), images)


@pytest.mark.parametrize("pad", [0, 1, 4, 7])
def test_draws_are_torchvisions(pad: int) -> None:
    padded = torch.zeros(1, 32 + 2 * pad, 32 + 2 * pad)
    torch.manual_seed(3)
    top, left, flip = draw_crop_flip(300, pad=pad, hflip=0.3)
    after = torch.rand(2)
    torch.manual_seed(3)
    for index in range(300):
        y, x, *_ = tv.RandomCrop.get_params(padded, (32, 32))
        assert (y, x, bool(torch.rand(1) < 0.3)) == (int(top[index]), int(left[index]), bool(flip[index]))
    assert torch.equal(torch.rand(2), after)


@pytest.mark.parametrize("pad", [1, 8])
def test_offsets_are_uniform_and_flips_as_likely_as_told(pad: int) -> None:
    torch.manual_seed(0)
    count, spans = 40_000, 2 * pad + 1
    top, left, flip = draw_crop_flip(count, pad=pad, hflip=0.3)
    seen = torch.bincount(top * spans + left, minlength=spans**2).float()
    expected = count / spans**2
    chi2 = ((seen - expected) ** 2 / expected).sum().item()
    assert len(seen) == spans**2 and abs(chi2 - spans**2) < 5 * (2 * spans**2) ** 0.5
    assert flip.float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert flip[top == 0].float().mean().item() == pytest.approx(0.3, abs=0.05)  # whatever the crop
    for hflip in (0.0, 1.0):
        assert draw_crop_flip(500, pad=pad, hflip=hflip)[2].float().mean() == hflip


def test_a_resumed_training_ends_with_the_same_bits(tmp_path: Any) -> None:
    source, config = digits(), TrainConfig(epochs=3, batch_size=16, lr=0.05)

    def run(stop_after: int | None, resume: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 10))
        loader = resident(source, plan=busy_plan(source.labels), augment="crop_flip", batch_size=16, training=True)

        def stop(model: nn.Module, epoch: int) -> bool:
            if epoch == stop_after:
                raise InterruptedError
            return False

        fit(model, loader, runtime=CPU, train=config, state=tmp_path / f"{resume}", resume=resume, after_epoch=stop)
        return model

    straight = run(None, False)
    with pytest.raises(InterruptedError):
        run(1, True)
    resumed = run(None, True)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_a_plan_for_other_data_is_refused() -> None:
    source = digits()
    for plan, message in (
        (NABPlan.empty(source.labels[1:]), "the plan is for 69 samples, the data set has 70"),
        (NABPlan.empty(source.labels, "e" * 64), "fingerprint eeeeeeeeeeee"),
        (NABPlan.empty(np.roll(source.labels, 1)), "the plan saw other labels than the data set has now; scan again"),
    ):
        with pytest.raises(ValueError, match=message):
            resident(source, plan=plan, augment="none", batch_size=16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("distortion", [Distortion(), Distortion(erase=0.5)])
def test_a_gpu_gives_the_same_batches(distortion: Distortion) -> None:
    source, knobs = colored(), {"augment": "crop_flip", "batch_size": 16, "training": True, "distortion": distortion}
    plan = busy_plan(source.labels)
    ours = walked(resident(source, Runtime(device="cuda"), plan, **knobs))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, walked(resident(source, plan=plan, **knobs)), strict=True))
