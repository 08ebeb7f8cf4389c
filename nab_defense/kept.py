"""Kept: what unfinished work leaves on disk, part by part, so that a kill does not lose it."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import io

__all__ = ["Kept", "hashed"]


class Kept:
    """States of one piece of work by name, each in a file of its own.

    Args:
        folder: Of these files; None: nothing is kept.
        key: JSON-able, all that the work depends on.
        resume: Take up what is there; else it is deleted.

    Raises:
        ValueError: To be resumed is what work with another key left.
    """

    def __init__(self, folder: Path | None = None, key: Any = None, *, resume: bool = False) -> None:
        self.folder, self.begun, self.last = folder, time.monotonic(), dict[str, float]()
        if folder is None:
            return
        told = folder / "key.json"
        if not (resume and told.exists()):
            shutil.rmtree(folder, ignore_errors=True)
            io.save_json(told, key)
        elif io.load_json(told) != key:
            raise ValueError(
                f"{folder} was left by a run with another model, other images or settings; give what that had, use another --out,"
                " or leave out --resume to start over (what was done there is lost)"
            )

    def read(self, name: str) -> dict[str, Any] | None:
        """The state of this name, on the CPU; None where none was kept."""
        if self.folder is None or not self._path(name).exists():
            return None
        return io.load_state(self._path(name))

    def write(self, name: str, state: Callable[[], dict[str, Any]], *, every: float = 0.0) -> None:
        """Keep what `state` gives, in place of what was kept; at most once in so many seconds.

        Args: state: Tensors, numbers, strings, lists, dicts; asked for only where it is kept."""
        now = time.monotonic()
        if self.folder is not None and now - self.last.get(name, self.begun) >= every:
            io.save_state(self._path(name), state())
            self.last[name] = now

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was kept of this name, or what `make` gives, which then is kept."""
        saved = self.read(name)
        if saved is None:
            saved = make()
            self.write(name, lambda: saved)
        return saved

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.state"


def hashed(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
