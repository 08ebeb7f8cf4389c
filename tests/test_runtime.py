from __future__ import annotations

import dataclasses
import os
import platform
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nab_defense import runtime as module
from nab_defense.runtime import Runtime, fixed_seed, spare_bytes
from nab_defense.train import TrainConfig, fit


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


def test_fixed_seed_repeats_python_numpy_and_torch() -> None:
    found = []
    for parts in ((0,), (0, 0), (0, 1), (1, 0), (0, 1)):
        fixed_seed(*parts)
        found.append(draws())
    assert found[2] == found[4]
    for place in range(3):  # each library follows the seed
        assert len({sample[place] for sample in found[1:4]}) == 3


def test_unknown_and_missing_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="device 'gpu' is not a device; use auto, cpu or cuda"):
        Runtime(device="gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"device '{device}' asked for, but this machine shows no CUDA device"):
            Runtime(device=device)
    assert Runtime().torch_device == torch.device("cpu")
    with pytest.raises(ValueError, match="precision must be auto, bfloat16 or float32, got 'float16'"):
        Runtime(precision="float16")


@pytest.mark.parametrize("fast", [True, False])
def test_auto_precision_is_bfloat16_only_where_the_processor_has_it(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: fast, raising=False)
    expected = torch.bfloat16 if fast else torch.float32
    runtime = Runtime(device="cpu")
    assert runtime.amp_dtype == expected
    with runtime.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == expected


def test_set_precision_is_kept() -> None:
    assert Runtime(device="cpu", precision="bfloat16").amp_dtype == torch.bfloat16
    assert Runtime(device="cpu", precision="float32").amp_dtype == torch.float32


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format(channels_last: bool) -> None:
    runtime = Runtime(device="cpu", channels_last=channels_last)
    model = runtime.place(nn.Conv2d(3, 4, 3))
    images = torch.rand(2, 3, 8, 8)
    put = runtime.put(images)
    assert torch.equal(put, images)
    for tensor in (put, model.weight):
        assert isinstance(tensor, torch.Tensor)
        assert tensor.is_contiguous(memory_format=torch.channels_last) is channels_last


@pytest.mark.parametrize("channels", [3, 7])
def test_a_narrow_strided_stem_trains(channels: int) -> None:
    """In NHWC order torch 2.15 ends the process there."""
    runtime = Runtime(device="cpu", precision="float32")
    stem = nn.Conv2d(channels, 48, 1, stride=2, bias=False)
    for _ in range(2):
        runtime.place(stem)
    images = torch.rand(64, channels, 32, 32, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        stem(runtime.put(images)).square().sum().backward()
    assert stem.weight.stride() == (channels, 1, 1, 1) and len(stem._forward_pre_hooks) == 1
    expected = torch.einsum("oi,bihw->bohw", stem.weight[:, :, 0, 0], images[:, :, ::2, ::2])
    torch.testing.assert_close(stem(runtime.put(images)), expected)


def test_threads_are_set_by_place_alone() -> None:
    Runtime(device="cpu").place(nn.Linear(1, 1))  # whatever other tests left
    before = torch.get_num_threads()
    try:
        Runtime(device="cpu", threads=before + 1)
        assert torch.get_num_threads() == before
        for threads, found in ((before + 1, before + 1), (before + 2, before + 2), (None, before), (None, before)):
            Runtime(device="cpu", threads=threads).place(nn.Linear(1, 1))
            assert torch.get_num_threads() == found
        torch.set_num_threads(before + 3)  # by the program that uses the package
        Runtime(device="cpu").place(nn.Linear(1, 1))
        assert torch.get_num_threads() == before + 3
    finally:
        torch.set_num_threads(before)


def test_cuda_alone_is_asked_for_kernels_that_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    Runtime(device="cpu").place(nn.Linear(1, 1))
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    try:
        module._repeat_on_cuda()
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_hardware_names_processor_memory_threads_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, cores = Runtime(device="cpu", precision="float32"), f"{os.cpu_count()} cores"
    threads, kind = f"{torch.get_num_threads()} threads, float32", torch.backends.cpu.get_cpu_capability()
    told = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: Other\n"
    with monkeypatch.context() as linux:
        linux.setattr(module, "told_bytes", lambda file, key: {("meminfo", "MemTotal"): 24 * 2**30 + 5}[file, key])
        linux.setattr(Path, "read_text", lambda path, **_: {"/proc/cpuinfo": told}[str(path)])
        assert runtime.hardware() == f"Some CPU @ 2 GHz ({kind}), {cores}, 24 GiB, {threads}"
        linux.setattr(Path, "read_text", lambda path, **_: "processor\t: 0\n")
        linux.setattr(module, "told_bytes", lambda file, key: None)
        assert runtime.hardware() == f"{platform.machine()} CPU ({kind}), {cores}, {threads}"
    assert runtime.hardware().endswith(threads)
    with pytest.raises(dataclasses.FrozenInstanceError):
        runtime.seed = 1  # type: ignore[misc]


MEMINFO, V2, V1 = {"/proc/meminfo": "MemAvailable: 8000 kB"}, "/sys/fs/cgroup", "/sys/fs/cgroup/memory"
OWN = {"/proc/self/cgroup": "0::/a/b", f"{V2}/a/b/memory.max": "900", f"{V2}/a/b/memory.current": "700"}
OWN |= {f"{V2}/a/b/memory.stat": "file 300\ninactive_file 50"}
ABOVE = {f"{V2}/a/memory.max": "max", f"{V2}/memory.max": "500", f"{V2}/memory.current": "600", f"{V2}/memory.stat": "file 1"}
FIRST = {"/proc/self/cgroup": "9:pids:/x\n4:memory:/seen/outside\n0::/", f"{V1}/memory.limit_in_bytes": "10000"}
FIRST |= {f"{V1}/memory.usage_in_bytes": "4000", f"{V1}/memory.stat": "inactive_file 1\ntotal_inactive_file 20"}


@pytest.mark.parametrize(
    ("files", "bytes_"),
    [
        ({}, None),
        (MEMINFO, 8_192_000),
        (MEMINFO | {"/proc/self/cgroup": "0::/"}, 8_192_000),
        (MEMINFO | OWN, 250),
        (OWN, 250),
        (MEMINFO | OWN | ABOVE, 0),
        (MEMINFO | FIRST, 6020),
        (MEMINFO | FIRST | {f"{V1}/memory.limit_in_bytes": str(2**63 - 4096)}, 8_192_000),
    ],
    ids=["other system", "no groups", "topmost", "own", "own alone", "above", "first version", "first version, no limit"],
)
def test_a_containers_limit_counts_as_memory(files: dict[str, str], bytes_: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(path: Path, **_: str) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert spare_bytes() == bytes_


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_auto_takes_the_gpu() -> None:
    runtime = Runtime()
    assert runtime.torch_device.type == "cuda" and runtime.put(torch.ones(1, 3, 2, 2)).is_cuda


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_training_on_a_gpu_repeats_bit_for_bit() -> None:
    images = torch.rand(256, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batches, weights = [(part, torch.arange(64) % 2) for part in images.split(64)], []
    for _ in range(2):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, stride=2), nn.Flatten()]
        network = nn.Sequential(*layers, nn.Linear(64 * 36, 2))
        fit(network, batches, runtime=Runtime(), train=TrainConfig(epochs=3, lr=0.01))
        weights.append([p.detach().cpu() for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


FAULTS = """
import resource, sys, torch
from nab_defense.runtime import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)  # 64 MiB, written
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's allocator")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    def faults(how: str) -> int:
        return int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < faults("default") / 2  # a tenth, where the system takes no idle memory back
