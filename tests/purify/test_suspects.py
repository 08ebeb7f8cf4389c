"""Accused images help to judge: a candidate that still gives them their old label is as bad as one that is turned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from nab_defense.clean import CleanSet, Pixels
from nab_defense.kept import Kept
from nab_defense.purify import purify, run
from nab_defense.purify.base import Candidates, Notes, frozen
from nab_defense.runtime import Runtime
from nab_defense.universal import Pool

CPU = Runtime(device="cpu", precision="float32")
IMAGES = torch.zeros(60, 1, 4, 4, dtype=torch.uint8)
ACCUSED = CleanSet(IMAGES[:4], torch.tensor([1, 1, 1, 0]))


class Always(nn.Module):
    """Gives every image one class of three."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.label = label
        self.free, self.fixed = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.full((len(images),), self.label), 3).float()


@dataclass(frozen=True)
class Offers:
    """Offers networks that always give one class."""

    labelled: ClassVar[bool] = False
    least: ClassVar[int] = 1
    labels: tuple[int, ...]

    def check(self, network: Pixels, images: Tensor) -> None: ...

    def candidates(
        self, network: Pixels, clean: CleanSet, *, pool: Pool, runtime: Runtime, notes: Notes, kept: Kept
    ) -> Candidates:
        for label in self.labels:
            yield f"always {label}", frozen(Pixels(Always(label), [0.5], [0.25]))


@pytest.fixture(autouse=True)
def judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network in itself all are as good, and none has a slope to make perturbations by."""
    monkeypatch.setattr(run, "_pool", lambda *_, **__: None)
    monkeypatch.setattr(
        run, "Judge", lambda *_: lambda network: {"accuracy": 1.0, "error": 0.0, "n": 20, "proxy": 0.3, "class": 2}
    )


def repaired(*labels: int, suspects: CleanSet | None = ACCUSED, start: int = 1) -> Any:
    given: dict[str, Any] = {"mean": (0.5,), "std": (0.25,), "runtime": CPU}
    return purify(Always(start), CleanSet(IMAGES), Offers(labels), **given, suspects=suspects)


def test_the_proxy_is_the_larger_of_the_two() -> None:
    found = repaired(1, 0, 2)
    assert found.before == {"accuracy": 1.0, "error": 0.0, "n": 20, "proxy": 0.75, "class": 1, "obeyed": 0.75}
    assert [(row["obeyed"], row["proxy"], row["class"]) for row in found.candidates] == [
        (0.75, 0.75, 1),
        (0.25, 0.3, 2),
        (0, 0.3, 2),
    ]
    assert found.status == "accepted" and found.chosen == "always 0" and found.model.label == 0  # the first of equals


def test_an_accepted_model_can_be_trained_as_the_original_could() -> None:
    found = repaired(0)
    assert found.status == "accepted" and found.model.free.requires_grad and not found.model.fixed.requires_grad


def test_who_still_obeys_is_no_repair() -> None:
    assert repaired(1).status == "rejected"
    assert repaired(2, start=0).status == "rejected"  # the original obeys no more than it is turned: nothing to gain


def test_without_suspects_nothing_changes() -> None:
    found = repaired(0, 2, suspects=None)
    assert found.status == "rejected" and found.before == {"accuracy": 1.0, "error": 0.0, "n": 20, "proxy": 0.3, "class": 2}


@pytest.mark.parametrize("suspects", [CleanSet(IMAGES[:4]), CleanSet(IMAGES[:0], torch.zeros(0, dtype=torch.long))])
def test_suspects_that_tell_nothing(suspects: CleanSet) -> None:
    with pytest.raises(ValueError, match="suspects must be images with the labels they were given"):
        repaired(0, suspects=suspects)


def test_suspects_unlike_the_clean_images_are_refused_before_anything_is_made() -> None:
    for images in (IMAGES[:4].float(), IMAGES[:4, :, :2], IMAGES[:4].expand(4, 3, 4, 4)):
        with pytest.raises(
            ValueError, match=r"suspects are torch\..* images of \(.*\), the clean images torch.uint8 of \(1, 4, 4\)"
        ):
            repaired(0, suspects=CleanSet(images, ACCUSED.labels))
