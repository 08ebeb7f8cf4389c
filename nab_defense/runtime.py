"""Where and how things run: device, precision, memory format, compilation, seed."""

from __future__ import annotations

import ctypes
import os
import platform
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import ranks

__all__ = ["Runtime", "evaluating", "fixed_seed", "keep_freed_memory", "spare_bytes", "told_bytes"]

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGEST = 2**30  # bytes; a tensor above it is mapped for itself, as before
# Linux's control groups, the second version and the first, by their name in /proc/self/cgroup: the folder below /sys/fs/cgroup,
# the files of the limit and of what is used, and what memory.stat calls the cached files that are given up first.
GROUPS = {
    "": (".", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}

_before: int | None = None  # torch's number of threads, where a Runtime set another


def fixed_seed(*parts: int) -> None:
    """Seed Python, numpy and torch from a tuple of integers, e.g. (seed, epoch)."""
    value = int(np.random.SeedSequence(list(parts)).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The network in eval mode; then each of its modules gets its own mode back, as some may be frozen."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def keep_freed_memory() -> None:
    """Have the process keep what it frees for its next tensors, where its allocator is glibc's.

    By default each tensor of some MB is mapped from the system and returned to it, and the system zeroes every page anew: a tenth
    of a training step of a small network on a CPU. For programs, not for libraries: it is a setting of the whole process."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(MMAP_THRESHOLD, LARGEST)
    mallopt(TRIM_THRESHOLD, 2**31 - 1)


def told_bytes(file: str, key: str) -> int | None:
    """What Linux says of memory under a key of /proc/<file>, in bytes; None on other systems."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc", file).read_text(encoding="ascii").splitlines())
        return 1024 * int(lines[key].split()[0])
    except (OSError, ValueError, KeyError):
        return None


def spare_bytes() -> int | None:
    """Bytes that this process could still take: what the system has available, or less where a control group that it is in (of a
    container, say) has a limit; None where nothing is known."""
    found, told = [], told_bytes("meminfo", "MemAvailable")
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for kind, own in (line.split(":", 2)[1:] for line in lines):
        if kind in GROUPS:
            folder, limit, used, cached = GROUPS[kind]
            top = Path("/sys/fs/cgroup", folder)
            group = top / own.lstrip("/")
            # A container may see its own group as the topmost, under the name that it has outside.
            found += [_left(place, limit, used, cached) for place in (group, *group.parents) if place.is_relative_to(top)]
    return min((count for count in (told, *found) if count is not None), default=None)


def _left(group: Path, limit: str, used: str, cached: str) -> int | None:
    """Bytes that a control group's limit leaves; None where it has none."""
    try:
        most, taken = (int((group / name).read_text(encoding="ascii")) for name in (limit, used))  # of no limit it says "max"
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, most - taken + int(stat.get(cached, 0)))
    except (OSError, ValueError):
        return None


def _processor() -> str:
    """Its name, as Linux tells it; elsewhere its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    except (OSError, StopIteration):
        return f"{platform.machine()} CPU"


def _cpu_has_bfloat16() -> bool:
    # Without these instructions bfloat16 convolutions are emulated: measured 10x slower than float32 on AVX2.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def _set_threads(count: int | None) -> None:
    """None: as many as there were before another number was set here."""
    global _before
    if count is not None:
        _before = _before or torch.get_num_threads()
        torch.set_num_threads(count)
    elif _before is not None:
        torch.set_num_threads(_before)
        _before = None


def _repeat_on_cuda() -> None:
    """Have CUDA choose kernels that give the same bits every time, as the CPU's do; where there is none it takes another."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def _spare_narrow_stems(model: nn.Module) -> None:
    """Leave strided 1x1 convolutions of fewer than eight channels, as RepVGG's and MobileOne's stems have, in NCHW order:
    torch 2.15 ends the process there, a double free, if weights or images are in NHWC order on a CPU."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels < 8 and layer.kernel_size == (1, 1) and max(layer.stride) > 1:
            layer.weight.data = layer.weight.data.clone(memory_format=torch.contiguous_format)  # of 1x1 both orders pass for it
            if _in_order not in layer._forward_pre_hooks.values():
                layer.register_forward_pre_hook(_in_order)


def _in_order(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(given.contiguous() for given in inputs)


@dataclass(frozen=True)
class Runtime:
    """Execution settings, decided once and passed down.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...; of several ranks each takes a GPU of its own.
        precision: "auto" (bfloat16 where the hardware has it), "bfloat16" or "float32".
        channels_last: Keep images and convolutions in NHWC order.
        compile: Use torch.compile.
        workers: Loader processes; 0 loads in the training process. Small images, which are held on the device, need none.
        threads: Processor threads for torch; None: all cores, or OMP_NUM_THREADS. Tiny networks run best on one.
        sync_bn: Of several ranks, have BatchNorm take the images of all of them; on GPUs only.
        seed: Seed of everything random.
    """

    device: str = "auto"
    precision: str = "auto"
    channels_last: bool = True
    compile: bool = False
    workers: int = 0
    threads: int | None = None
    sync_bn: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"precision must be auto, bfloat16 or float32, got {self.precision!r}")
        try:
            device = self.torch_device
        except RuntimeError as error:
            raise ValueError(f"device {self.device!r} is not a device; use auto, cpu or cuda") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {self.device!r} asked for, but this machine shows no CUDA device; use device=cpu")
        if ranks.count() > 1:
            self._check_ranks(device)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device {self.device!r} asked for, but this machine has {torch.cuda.device_count()}; use cuda:0")

    def _check_ranks(self, device: torch.device) -> None:
        if device.type == "cuda" and self.device not in ("auto", "cuda"):
            raise ValueError(f"device {self.device!r} is one, for {ranks.count()} ranks; use cuda, of which each takes its own")
        if device.type == "cuda" and ranks.beside() > torch.cuda.device_count():
            have = f"{ranks.beside()} ranks on a machine with {torch.cuda.device_count()} GPU"
            raise ValueError(f"{have}: start as many ranks as there are, or use runtime.device=cpu")
        if device.type == "cpu" and self.sync_bn:
            raise ValueError("sync_bn needs GPUs, torch has no such BatchNorm for the CPU; leave out runtime.sync_bn")

    @property
    def torch_device(self) -> torch.device:
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        return torch.device("cuda", ranks.local()) if kind == "cuda" and ranks.count() > 1 else torch.device(kind)

    @property
    def amp_dtype(self) -> torch.dtype:
        """float32 or bfloat16, with "auto" resolved for this machine."""
        if self.precision != "auto":
            return torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        on_gpu = self.torch_device.type == "cuda"
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else _cpu_has_bfloat16()
        return torch.bfloat16 if fast else torch.float32

    def autocast(self) -> AbstractContextManager[object]:
        if self.amp_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.torch_device.type, dtype=self.amp_dtype)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device and memory format, in place; sets the number of threads and, on CUDA, repeatable kernels."""
        _set_threads(self.threads)
        if self.torch_device.type == "cuda":
            _repeat_on_cuda()
        model = model.to(self.torch_device)
        if not self.channels_last:
            return model
        model = model.to(memory_format=torch.channels_last)
        if self.torch_device.type == "cpu":
            _spare_narrow_stems(model)
        return model

    def put(self, images: Tensor) -> Tensor:
        """Move a batch (B, C, H, W) to the device and memory format."""
        images = images.to(self.torch_device, non_blocking=True)
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def hardware(self) -> str:
        """One line for reports: processor or GPU, its memory, threads, precision, ranks; nothing that names this very machine."""
        parts = [str(self.amp_dtype).removeprefix("torch."), *([f"{ranks.count()} ranks"] if ranks.count() > 1 else [])]
        if self.torch_device.type == "cuda":
            found = torch.cuda.get_device_properties(self.torch_device)
            return ", ".join([found.name, f"{found.total_memory / 2**30:.0f} GiB", *parts])
        memory = told_bytes("meminfo", "MemTotal")
        room = [] if memory is None else [f"{memory / 2**30:.0f} GiB"]
        processor = f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"
        return ", ".join(
            [processor, f"{os.cpu_count()} cores", *room, f"{self.threads or torch.get_num_threads()} threads", *parts]
        )
