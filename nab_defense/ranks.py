"""Ranks: the processes of one run, started by torchrun; what they tell each other, and which of them does what.

All ranks run the same program, call the same functions here in the same order, and share the disk of the run's folder. A process
that has not joined others is rank 0 of 1: nothing is sent then, and everything is as if this file were not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

__all__ = [
    "beside", "check_batch", "count", "deal", "in_order", "joined", "leads", "local", "lost", "on_first", "part", "rank",
    "restarted", "same", "share", "speaks", "total", "wait", "watched",
]  # fmt: skip

PATIENCE = timedelta(days=1)  # others wait while one works alone; a rank that dies is noticed by its connection, not by this
T = TypeVar("T")


@dataclass(frozen=True)
class _Here:
    """This process among the others: its rank, how many there are, the same on its machine, and what they count in together."""

    rank: int = 0
    count: int = 1
    local: int = 0
    beside: int = 1
    store: Any = None


_here = _Here()


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes that torchrun started; without torchrun, or with one process, nothing happens.

    For programs, not for libraries: from here on the functions that read a whole source wait for the other ranks to take part.
    Those that compute on a GPU talk over NCCL, everything else over gloo."""
    global _here
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    found, number, size = next(dist.rendezvous("env://"))
    # What ranks that torchrun started before left there, such as their addresses, is not for these.
    store, own = (dist.PrefixStore(f"start {_starts()}", one) for one in (found, found.clone()))
    place = int(os.environ["LOCAL_RANK"])
    if on_gpu := place < torch.cuda.device_count():
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=PATIENCE)
    # A connection of its own: the group's is taken while somebody waits at it.
    _here = _Here(number, size, place, int(os.environ["LOCAL_WORLD_SIZE"]), own)
    try:
        yield
    finally:
        _here = _Here(store=_here.store)  # what ended this rank has been said
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return _here.rank


def count() -> int:
    """How many processes there are."""
    return _here.count


def local() -> int:
    """Number of this process among those on its machine, which is also the number of its GPU."""
    return _here.local


def beside() -> int:
    """How many processes share this machine."""
    return _here.beside


def leads() -> bool:
    """Whether this is the rank that writes, logs and shows progress."""
    return _here.rank == 0


def restarted() -> bool:
    """Whether torchrun started this program again after a rank was lost."""
    return _starts() > 0


def _starts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def speaks() -> bool:
    """True for the first rank that asks, so that what went wrong is said once, and not by every rank that it stops."""
    if _here.store is None:
        return True
    try:
        return bool(_here.store.add("spoken", 1) == 1)
    except RuntimeError:  # the store is gone with the process that held it
        return True


def watched(items: Iterable[T], title: str, total: int | None = None, *, done: int = 0, unit: str = "it") -> Iterable[T]:
    """The items, with a progress bar where someone watches; of several ranks the first shows it.

    Args: total: How many there are, where they cannot tell. done: How many went before."""
    disable = None if leads() else True
    return tqdm(items, title, total, initial=done, unit=unit, leave=False, disable=disable)


def lost(error: BaseException) -> bool:
    """Whether an error only says that another rank cannot be reached any more."""
    return count() > 1 and (isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)))


# Telling each other


def _exchange(message: bytes) -> list[bytes]:
    """What each rank says, in the order of their numbers."""
    if count() == 1:
        return [message]
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(count())]
    dist.all_gather(lengths, torch.tensor([len(message)]))
    longest = max(1, *(int(length) for length in lengths))
    own = torch.frombuffer(bytearray(message.ljust(longest, b"\0")), dtype=torch.uint8)
    heard = [torch.empty_like(own) for _ in lengths]
    dist.all_gather(heard, own)
    return [text[: int(length)].numpy().tobytes() for text, length in zip(heard, lengths, strict=True)]


def wait() -> None:
    """Go on when all ranks are here."""
    _exchange(b"")


def same(value: T) -> T:
    """What rank 0 says, where ranks might differ; anything that JSON can hold."""
    if count() == 1:
        return value
    told: T = json.loads(_exchange(json.dumps(value).encode() if leads() else b"")[0])
    return told


def total(*values: float) -> list[float]:
    """Each number summed over the ranks, with the same bits on all of them."""
    if count() == 1:
        return list(values)
    return [sum(row) for row in zip(*map(json.loads, _exchange(json.dumps(values).encode())), strict=True)]


def on_first(work: Callable[[], T]) -> T:
    """Have rank 0 do something as if it were alone, once all are here; the others get what came of it, in JSON's types."""
    global _here
    wait()
    here, value = _here, None
    if leads():
        _here = _Here(store=here.store)
        try:
            value = work()
        finally:
            _here = here
    return same(value)  # type: ignore[return-value]


@torch.no_grad()
def share(module: nn.Module) -> None:
    """Give every rank the weights and buffers that rank 0 has, in place."""
    if count() == 1:
        return
    for tensor in (*module.parameters(), *module.buffers()):
        plain = tensor.detach().contiguous()  # which channels_last is not
        dist.broadcast(plain, 0)
        tensor.copy_(plain)


# Sharing work


def check_batch(size: int) -> None:
    """Refuse batches that are too small to be split.

    Raises:
        ValueError: A rank would get less than two images, of which BatchNorm can tell nothing."""
    if count() > 1 and size < 2 * count():
        raise ValueError(
            f"batches of {size} images cannot be split over {count()} ranks, which need two each; raise train.batch_size "
            f"(or add images) to {2 * count()}, or start fewer ranks"
        )


def part(size: int) -> slice:
    """This rank's part of a batch; parts differ by one image at most."""
    return slice(size * rank() // count(), size * (rank() + 1) // count())


def deal(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Deal out the whole batches of an ordered pass, so that each is computed as in a single process.

    Args:
        batches: (images, labels); with a method `dealt(rank, count)`, see loaders.Ordered, the others' are not even read.

    Yields: where in the pass a batch of this rank begins, its images and labels."""
    if count() > 1 and hasattr(batches, "dealt"):
        yield from batches.dealt(rank(), count())
        return
    first = 0
    for index, (images, labels) in enumerate(batches):
        if index % count() == rank():
            yield first, images, labels
        first += len(images)


def in_order(own: Sequence[Tensor]) -> list[Tensor]:
    """What all ranks made of the batches that were dealt out, in the order of the pass; on the CPU.

    Args: own: A tensor for each batch of this rank, in order."""
    if count() == 1:
        return list(own)
    packed = safetensors.torch.save({str(index): tensor.detach().cpu().clone() for index, tensor in enumerate(own)})
    heard = [safetensors.torch.load(message) for message in _exchange(packed)]
    return [heard[i % count()][str(i // count())] for i in range(sum(map(len, heard)))]
