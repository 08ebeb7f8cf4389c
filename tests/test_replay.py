from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nab_defense import io, replay
from nab_defense.replay import fit_once, scan_key
from nab_defense.runtime import Runtime
from nab_defense.scan import EarlyScan, Scan
from nab_defense.train import TrainConfig

CPU = Runtime(device="cpu", precision="float32")


class Case:
    """One tiny scan, run as often as asked; counts the batches that were trained on."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.data = TensorDataset(torch.randn(24, 3, 32, 32, generator=generator), torch.arange(24) % 3)
        self.trained = 0

    def run(self, stop: int = 4, *, kept: bool = True, lr: float = 0.01) -> tuple[list[Scan], nn.Module]:
        torch.manual_seed(0)
        network = timm.create_model("test_resnet", num_classes=3)
        train = TrainConfig(epochs=4, batch_size=8, lr=lr, sched="none")
        seen: list[Scan] = []

        def look(scan: Scan) -> bool:
            seen.append(scan)
            return scan.epoch == stop

        def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            self.trained += 1
            return F.cross_entropy(logits, labels)

        labels = self.data.tensors[1].numpy()
        passes = EarlyScan(DataLoader(self.data, 10), labels, look=look, runtime=CPU, fingerprint="f")
        key = scan_key(network, "f", runtime=CPU, lr=lr) if kept else None
        loader: Any = DataLoader(self.data, 8, shuffle=True)
        fit_once(network, loader, passes, key=key, runtime=CPU, train=train, loss=loss)
        assert passes.last is seen[-1]
        return seen, network


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NAB_CACHE", str(tmp_path))
    return tmp_path / "scans"


def alike(first: tuple[list[Scan], nn.Module], second: tuple[list[Scan], nn.Module]) -> bool:
    for one, other in zip(first[0], second[0], strict=True):
        for name in ("labels", "losses", "logits", "features"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert (one.epoch, one.fingerprint) == (other.epoch, other.fingerprint)
    states = first[1].state_dict(), second[1].state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_scan_is_trained_once(cache: Path) -> None:
    case = Case()
    fresh = case.run(kept=False)
    assert case.trained == 12 and not cache.exists()
    assert alike(fresh, case.run()) and case.trained == 24
    assert alike(fresh, case.run()) and case.trained == 24
    assert alike((fresh[0][:2], case.run(2)[1]), case.run(2)) and case.trained == 24
    case.run(lr=0.02)
    assert case.trained == 36 and len(list(cache.iterdir())) == 2


def test_a_scan_that_was_left_early_goes_on_from_there(cache: Path) -> None:
    case = Case()
    case.run(2)
    assert case.trained == 6
    longer = case.run()
    assert case.trained == 12 and alike(case.run(kept=False), longer)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # numpy leaves a broken zip file open
@pytest.mark.parametrize("name", ["epoch3.npy", "epoch3.npz", "epoch3.state"])
@pytest.mark.parametrize("harm", ["cut", "changed", "gone"])
def test_broken_files_are_made_again(name: str, harm: str, cache: Path) -> None:
    case = Case()
    fresh = case.run()
    (file,) = cache.glob(f"*/{name}")
    whole = file.read_bytes()
    file.unlink()
    if harm != "gone":
        file.write_bytes(whole[:-20] if harm == "cut" else whole[:200] + bytes([whole[200] ^ 255]) + whole[201:])
    assert alike(fresh, case.run()) and case.trained == 18  # two of four epochs more
    assert alike(fresh, case.run()) and case.trained == 18
    assert not list(cache.glob("*/[0-9]*.state")) and not list(cache.glob("*/.*"))


def test_without_a_place_to_keep_it_a_scan_runs_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NAB_CACHE", str(tmp_path / "file"))
    case = Case()
    assert alike(case.run(kept=False), case.run()) and case.trained == 24


def test_on_a_disk_that_is_nearly_full_a_scan_runs_all_the_same(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(cache.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=replay.LARGEST - 1))
    case = Case()
    assert alike(case.run(kept=False), case.run()) and case.trained == 24 and not list(cache.iterdir())


def test_old_scans_make_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    case.run()
    (first,) = cache.iterdir()
    size = sum(file.stat().st_size for file in first.iterdir())
    monkeypatch.setattr(replay, "LARGEST", int(1.5 * size))
    case.run(lr=0.02)
    (second,) = cache.iterdir()
    assert second != first
    monkeypatch.setattr(replay, "LARGEST", size // 4)
    case.run(lr=0.03)
    assert not [path for path in cache.rglob("*") if path.is_file() and path.parent not in (first, second)]


@pytest.mark.parametrize("what", ["processor", "pillow", "torchvision", "data/folder.py"])
def test_so_do_the_machine_and_what_reads_the_images(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    network = nn.Linear(2, 3)
    before = scan_key(network, "f", runtime=CPU)
    if what == "processor":
        monkeypatch.setattr("nab_defense.runtime._processor", lambda: "another")
    elif what.endswith(".py"):
        shutil.copytree(replay.CODE, tmp_path / "code", ignore=shutil.ignore_patterns("__pycache__"))
        (tmp_path / "code" / what).write_text("# other code")
        monkeypatch.setattr(replay, "CODE", tmp_path / "code")
    else:
        monkeypatch.setattr(replay, "version", lambda name: "0" if name == what else version(name))
    assert scan_key(network, "f", runtime=CPU) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key(fingerprint="g"),
        lambda key: key(runtime=Runtime(device="cpu", precision="bfloat16")),
        lambda key: key(size=8),
        lambda key: key(network=nn.Linear(2, 3)),
    ],
)
def test_every_fact_enters_the_key(change: Callable[..., str]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(2, 3)

    def key(*, network: nn.Module = linear, fingerprint: str = "f", runtime: Runtime = CPU, size: int = 9) -> str:
        return scan_key(network, fingerprint, runtime=runtime, size=size)

    assert key() == key() != change(key)


def test_an_array_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    io.save_array(tmp_path / "a.npy", table)
    found = io.load_array(tmp_path / "a.npy")
    assert isinstance(found, np.memmap) and np.array_equal(found, table) and not found.flags.writeable
    with pytest.raises(ValueError, match=r"no such file: .*b\.npy"):
        io.load_array(tmp_path / "b.npy")


def test_what_is_no_scan_is_left_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "patient1").mkdir(parents=True)
    (cache / "patient1" / "large").write_bytes(bytes(1000))
    monkeypatch.setattr(replay, "LARGEST", 0)
    monkeypatch.setattr(replay.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1, 0, 1))  # type: ignore[attr-defined]
    Case().run()
    assert (cache / "patient1" / "large").exists()


@pytest.mark.parametrize("step", ["keep", "make_room"])
def test_a_scan_outlives_its_cache(step: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any) -> None:
        raise FileNotFoundError("another process deleted it")

    monkeypatch.setattr(replay._Kept, step, gone)
    case = Case()
    assert alike(case.run(kept=False), case.run()) and case.trained == 24
