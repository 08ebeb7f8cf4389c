"""What ranks decide without talking; the rest is in tests/distributed/."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nab_defense import ranks
from nab_defense.data import open_source
from nab_defense.loaders import Loaders, Ordered
from nab_defense.runtime import Runtime
from nab_defense.stamp import Stamp

CPU = Runtime(device="cpu", precision="float32")
BATCHES = [(torch.full((size, 1), size), torch.arange(size)) for size in (3, 2, 4)]


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    monkeypatch.setattr(ranks, "_here", ranks._Here(rank, count, rank, count))


def test_a_process_alone_is_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")  # left by something else than torchrun
    value = {"as": (1, 2)}
    with ranks.joined():
        assert (ranks.rank(), ranks.count(), ranks.leads(), ranks.restarted()) == (0, 1, True, False)
        assert ranks.same(value) is value and ranks.on_first(lambda: value) is value and ranks.total(1, 2.5) == [1, 2.5]
        assert ranks.speaks() and ranks.speaks() and not ranks.lost(RuntimeError("gloo: connection closed by peer"))
        assert [(first, len(images)) for first, images, _ in ranks.deal(BATCHES)] == [(0, 3), (3, 2), (5, 4)]
        assert ranks.in_order([BATCHES[0][0]])[0] is BATCHES[0][0]
        ranks.check_batch(1)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_parts_and_batches_are_dealt_out_once(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []
    dealt: list[tuple[int, int]] = []
    for rank in range(count):
        pretend(monkeypatch, rank, count)
        own = list(range(17))[ranks.part(17)]
        assert 17 // count <= len(own) <= 17 // count + 1
        parts += own
        dealt += [(first, len(images)) for first, images, _ in ranks.deal(BATCHES)]
    assert parts == list(range(17)) and sorted(dealt) == [(0, 3), (3, 2), (5, 4)]


def test_dealt_batches_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("digits").subset(range(0, 230, 2))
    loaders = Loaders(size=8, mean=(0.3,), std=(0.4,), hflip=0.5, stamp=Stamp(), runtime=CPU)
    whole = list(loaders(source, "none", 20, training=False))
    found = {}
    for rank in range(4):
        pretend(monkeypatch, rank, 4)
        batches = loaders(source, "none", 20, training=False)
        assert isinstance(batches, Ordered) and len(batches) == 6
        found |= {first: (images, labels) for first, images, labels in ranks.deal(batches)}
    assert sorted(found) == [0, 20, 40, 60, 80, 100]
    for index, (images, labels) in enumerate(whole):
        assert torch.equal(found[20 * index][0], images) and np.array_equal(found[20 * index][1], labels)


@pytest.mark.parametrize("room", [230, 120, 0])
def test_dealt_batches_are_held_where_the_whole_is(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source("digits").subset(range(0, 400, 2))
    loaders = Loaders(size=8, mean=(0.3,), std=(0.4,), hflip=0.5, stamp=Stamp(), runtime=CPU)
    loaders.store.free = free = room * 64
    pretend(monkeypatch, 1, 2)
    for _ in range(2):
        dealt = [len(images) for _, images, _ in ranks.deal(loaders(source, "none", 20, training=False))]
        assert dealt == [20] * 5 and loaders.store.free == free - 200 * 64 * (room > 200)


def test_what_many_ranks_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 1, 3)
    with pytest.raises(ValueError, match=r"batches of 5 images cannot be split over 3 ranks.*raise train.batch_size .* to 6"):
        ranks.check_batch(5)
    ranks.check_batch(6)
    with pytest.raises(ValueError, match="sync_bn needs GPUs"):
        Runtime(device="cpu", sync_bn=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device 'cuda:1' is one, for 3 ranks"):
        Runtime(device="cuda:1")
    with pytest.raises(ValueError, match="3 ranks on a machine with 2 GPU"):
        Runtime()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert Runtime(device="auto", precision="float32").torch_device == torch.device("cuda", 1)
