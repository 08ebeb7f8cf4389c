"""A purification that is killed again and again ends as one that was left alone; and takes up nothing that is not its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nab_defense import universal
from nab_defense.kept import Foreign, Kept, hashed, left
from nab_defense.purify import PurifyResult, purifiers, purify
from nab_defense.purify.base import choice, judge, loops
from nab_defense.runtime import Runtime
from tests.bars import bars, knows_bars

CPU = Runtime(device="cpu", precision="float32")
FEW: dict[str, Any] = {"steps": 5, "rounds": 2, "batch_size": 16}
METHODS: dict[str, dict[str, Any]] = {
    "ibau": {**FEW, "form": "fd"},
    "polarizer": FEW,
    "distill": FEW,
    "finetune": FEW,
    "ft_sam": FEW,
    "rnp": FEW,
    "clp": {"rounds": 3},
}


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is kept, few perturbations are made, and any candidate is taken."""
    monkeypatch.setattr(loops, "EVERY", 0.0)
    monkeypatch.setattr(choice, "LEAST_GAIN", -1.0)
    monkeypatch.setattr(judge, "PROBES", 1)
    monkeypatch.setattr(universal, "likely_classes", lambda *_, **__: [0, 1])


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """Knows its bars; with batch statistics and dropout, which must be taken up, too."""
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12), nn.ReLU()]
    model = nn.Sequential(*body, nn.Flatten(), nn.Dropout(0.2), nn.Linear(768, 4))
    return knows_bars(model, steps=30)


def repaired(model: nn.Module, method: str, **given: Any) -> PurifyResult:
    knobs = {**METHODS[method], **given.pop("knobs", {})}
    limits: dict[str, Any] = {"mean": (0.5,), "std": (0.25,), "runtime": CPU, "max_drop": 0.9}
    clean = given.pop("clean", bars(240))
    return purify(model, clean, purifiers.create(method, **knobs), **limits, **given)


def told(found: PurifyResult) -> dict[str, Any]:
    """All of it but the seconds, and the weights."""
    timeless = [{name: value for name, value in row.items() if name != "seconds"} for row in (*found.candidates, found.after)]
    rest = {name: getattr(found, name) for name in ("status", "chosen", "before", "stopped", "evidence")}
    networks = [found.model, *([] if found.unlearned is None else [found.unlearned])]
    return {**rest, "candidates": timeless, "weights": [hashed(network.state_dict()) for network in networks]}


def dies_at(write: int, *, after: bool) -> Callable[..., None]:
    """Kept.write that is killed at this call of it, with the state written or not."""
    whole, calls = Kept.write, [0]

    def deadly(self: Kept, *args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        if calls[0] != write or after:
            whole(self, *args, **kwargs)
        if calls[0] == write:
            raise KeyboardInterrupt

    return deadly


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first", [False, True])
def test_killed_again_and_again_it_ends_as_if_left_alone(
    method: str, first: bool, trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if first:  # one of the first is taken, of which only the weights are left
        monkeypatch.setattr(choice.Choice, "_better", lambda *_: False)
    alone, state = repaired(trained, method), tmp_path / "state"
    kills, found = 0, None
    while found is None:
        with monkeypatch.context() as patch:
            patch.setattr(Kept, "write", dies_at(1, after=True))
            try:
                found = repaired(trained, method, state=state, resume=True)
            except KeyboardInterrupt:
                kills += 1
    assert kills > len(alone.candidates) > 0 and alone.status == "accepted"
    assert not first or alone.chosen != alone.candidates[-1]["name"]
    assert told(found) == told(alone)


@pytest.mark.parametrize("write", [2, 4])
def test_what_was_not_written_is_done_anew(
    write: int, trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Kept, "write", dies_at(write, after=False))
        repaired(trained, "polarizer", state=tmp_path / "state")
    found = repaired(trained, "polarizer", state=tmp_path / "state", resume=True)
    assert told(found) == told(repaired(trained, "polarizer"))


def test_only_its_own_state_is_taken_up(trained: nn.Module, tmp_path: Path) -> None:
    state = tmp_path / "state"
    repaired(trained, "distill", state=state)
    kept = {path.name: path.read_bytes() for path in state.iterdir()}
    assert set(kept) == {"key.json", *(f"{name}.state" for name in ("before", "judged", "pool", "training"))}
    flipped = replace(bars(240), hflip=0.0)
    for given in ({"knobs": {"steps": 6}}, {"holdout": 0.3}, {"suspects": bars(4)}, {"clean": flipped}):
        with pytest.raises(
            Foreign, match=r"state was left by a run with another model, other images, .* or delete it to start over"
        ):
            repaired(trained, "distill", state=state, resume=True, **given)
    shifted, smooth = (nn.Sequential(*copy.deepcopy(trained)) for _ in range(2))
    shifted[0].bias.data += 1e-3
    smooth[2] = nn.GELU()  # the same weights
    for other in (shifted, smooth):
        with pytest.raises(Foreign, match="was left by a run with another model"):
            repaired(other, "distill", state=state, resume=True)
    assert {path.name: path.read_bytes() for path in state.iterdir()} == kept
    (state / "training.state").write_bytes(b"half of i")
    with pytest.raises(ValueError, match=r"training.state is not a training state of this package"):
        repaired(trained, "distill", state=state, resume=True)
    started_over = repaired(trained, "distill", state=state, knobs={"steps": 6})
    assert told(started_over) == told(repaired(trained, "distill", knobs={"steps": 6}))


def test_a_state_that_is_half_deleted_is_not_taken_up(trained: nn.Module, tmp_path: Path) -> None:
    state = tmp_path / "state"
    alone = repaired(trained, "distill", state=state)
    (state / "key.json").unlink()  # which goes first
    assert not left(state)
    assert told(repaired(trained, "distill", state=state, resume=True)) == told(alone)
    linked = tmp_path / "linked"
    linked.symlink_to(state)
    with pytest.raises(ValueError, match="linked is an earlier run's and cannot be deleted; delete it, or name"):
        repaired(trained, "distill", state=linked)
