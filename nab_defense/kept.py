"""Kept: what unfinished work leaves on disk, part by part, so that a kill does not lose it."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import io

__all__ = ["Foreign", "Kept", "forget", "hashed", "left"]


KEY = "key.json"


class Foreign(ValueError):
    """What is there is of other work."""


class Kept:
    """States of one piece of work by name, each in a file of its own.

    Args:
        folder: Of these files; None: nothing is kept.
        key: JSON-able, all that the work depends on.
        resume: Take up what is there; else it is deleted.

    Raises:
        Foreign: To be resumed is what work with another key left.
        ValueError: A state cannot be read, or not be deleted.
    """

    def __init__(self, folder: Path | None = None, key: Any = None, *, resume: bool = False) -> None:
        self.folder, self.begun, self.last, self.found = folder, time.monotonic(), dict[str, float](), dict[str, dict[str, Any]]()
        if folder is None:
            return
        if not (resume and left(folder)):
            if folder.exists() and not all(path.name == KEY or ".state" in path.name for path in folder.iterdir()):
                raise ValueError(f"{folder} is not of a run, and would be deleted; name another --out")
            forget(folder)
            if folder.exists():
                raise ValueError(f"{folder} is an earlier run's and cannot be deleted; delete it, or name another --out")
            io.save_json(folder / KEY, key)
        elif io.load_json(folder / KEY) != key:
            raise Foreign(
                f"{folder} was left by a run with another model, other images, settings or versions, or on another machine; give"
                " what that had, use another --out, or delete it to start over"
            )
        else:
            self.found = {path.stem: io.load_state(path) for path in sorted(folder.glob("*.state"))}

    def read(self, name: str) -> dict[str, Any] | None:
        """The state of this name that was there, on the CPU; None where there was none."""
        return self.found.get(name)

    def write(self, name: str, state: Callable[[], dict[str, Any]], *, every: float = 0.0) -> None:
        """Keep what `state` gives, in place of what was kept; at most once in so many seconds.

        Args: state: Tensors, numbers, strings, lists, dicts; asked for only where it is kept."""
        now = time.monotonic()
        if self.folder is not None and now - self.last.get(name, self.begun) >= every:
            io.save_state(self.folder / f"{name}.state", state())
            self.last[name] = now

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was kept of this name, or what `make` gives, which then is kept."""
        saved = self.read(name)
        if saved is None:
            saved = make()
            self.write(name, lambda: saved)
        return saved


def left(folder: Path) -> bool:
    """Whether unfinished work is there to be taken up."""
    return (folder / KEY).exists()


def forget(folder: Path) -> None:
    """Delete what was kept, as far as that can be done; the key first, without which nothing is taken up."""
    with suppress(OSError):
        (folder / KEY).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def hashed(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
