"""What purify refuses before it trains anything: images, labels, normalisation and networks that cannot be used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nab_defense.clean import CleanSet
from nab_defense.purify import check_known, purifiers, purify
from nab_defense.runtime import Runtime

IMAGES = torch.randint(0, 256, (60, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
LABELS = torch.arange(60) % 4
KNOBS = {"rounds": 1, "steps": 1, "batch_size": 20}


def network(outputs: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, outputs))


def run(model: nn.Module | None = None, images: Tensor = IMAGES, labels: Tensor | None = LABELS, **settings: Any) -> Any:
    settings = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "runtime": Runtime(device="cpu", threads=1), **settings}
    knobs = {name: settings.pop(name, value) for name, value in KNOBS.items()}
    method = purifiers.create("ibau", **knobs)
    return purify(network() if model is None else model, CleanSet(images, labels), method, **settings)


def test_the_others_are_taken() -> None:
    found = run()
    assert found.before["n"] == 12 and [row["name"] for row in found.candidates] == ["step 1"]
    assert set(found.before["by_class"]) <= set("0123") and max(found.before["by_class"].values()) == found.before["proxy"]


class Spoiled(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images


def nan() -> nn.Module:
    model = network()
    model[1].bias.data[2] = torch.nan  # type: ignore[index]
    return model


class Blind(nn.Module):
    """Whose answers to bright images are not finite."""

    def forward(self, images: Tensor) -> Tensor:
        means = images.mean((1, 2, 3))
        return torch.stack([torch.where(means > means.mean(), torch.nan, means)] * 4, 1)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"images": IMAGES.float()}, r"must be \(N, C, H, W\) uint8, N above 0, got \(2, 3, 8, 8\) torch.float32"),
    ({"images": IMAGES[:0], "labels": LABELS[:0]}, r"N above 0, got \(0, 3, 8, 8\)"),
    ({"images": IMAGES[:, 0]}, r"must be \(N, C, H, W\) uint8"),
    ({"images": IMAGES[:, :1]}, "mean has 3 values, the images have 1 channels"),
    ({"std": (0.25,)}, "std has 1 values, the images have 3 channels"),
    ({"std": (0.25, 0.0, 0.25)}, r"std must be positive, got \[0.25, 0.0, 0.25\]"),
    ({"mean": (124.0, 0.5, 0.5)}, r"mean is of pixels in \[0, 1\], got \[124.0, 0.5, 0.5\]; divide by 255"),
    ({"std": (0.25, float("nan"), 0.25)}, "std must be finite"),
    ({"images": torch.zeros(60, 3, 9, 9, dtype=torch.uint8)}, "the model cannot take 3x9x9 images: .*mat1 and mat2"),
    ({"model": Spoiled()}, r"the model gives \(2, 3, 8, 8\) for 2 images, expected \(images, classes\)"),
    ({"model": nan()}, r"the model's 1.bias holds values that are not finite \(1 such tensors\)"),
    ({"model": Blind()}, r"the model's logits of \d\d of the 60 clean images are not finite; check mean and std"),
    ({"labels": None}, "ibau needs the labels of the clean images"),
    ({"labels": LABELS[:50]}, r"labels must be \(N,\) and not negative, got \(50,\) for 60 images"),
    ({"labels": LABELS - 1}, "not negative"),
    ({"model": network(3)}, "labels up to 3, the model 3 classes from 0"),
    ({"model": network(5)}, "class 4 has 0 clean images; each of the 5 needs two"),
    ({"images": IMAGES[:7], "labels": LABELS[:7]}, "class 3 has 1 clean images"),
    ({"images": IMAGES[:22], "labels": LABELS[:22]}, "18 clean images are left to fit on, 4 being held out; ibau needs 20"),
    (
        {"images": IMAGES[:32], "labels": LABELS[:32]},
        "8 clean images are left to judge by; give more, or raise holdout: at least 10",
    ),
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
    ({"holdout": 0.0}, r"holdout must be in \(0, 1\)"),
    ({"max_drop": 1.5}, r"max_drop in \[0, 1\)"),
]


@pytest.mark.parametrize(("change", "says"), WRONG, ids=lambda value: value[:30] if isinstance(value, str) else "")
def test_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        run(**change)
    assert "\n" not in str(caught.value)


class Scripted(nn.Module):
    """The class that the first pixel holds."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(images[:, 0, 0, 0].round().long(), self.outputs).float()


def known(answers: Tensor, labels: Tensor, *, outputs: int = 4) -> None:
    """Check a model that gives these answers to images of these labels."""
    pixels = answers.to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    given: dict[str, Any] = {"mean": (0.0,), "std": (1 / 255,), "runtime": Runtime(device="cpu", precision="float32", threads=1)}
    check_known(Scripted(outputs), CleanSet(pixels, labels), **given)


MIXES = [(15, 15, 15, 15), (49, 1, 0, 0), (96, 2, 1, 1), (58, 2, 0, 0), (2, 2, 2, 2)]


@pytest.mark.parametrize("counts", MIXES)
def test_a_model_without_fault_is_known_and_one_class_for_all_is_not(counts: tuple[int, ...]) -> None:
    labels = torch.arange(4).repeat_interleave(torch.tensor(counts))
    known(labels, labels)
    for answer in range(4):
        with pytest.raises(ValueError, match="clean images rightly, as a guess might; check the order of classes"):
            known(torch.full_like(labels, answer), labels)


def test_a_model_of_another_order_of_classes_is_told_which() -> None:
    labels = torch.arange(12).repeat_interleave(10)
    order = torch.tensor(sorted(range(12), key=str)).argsort()  # as torchvision has folders that are named 0 to 11
    with pytest.raises(ValueError, match=r"0\.17 of the .* 1\.00 in another order: class 2, number 2 here, is its output 4;"):
        known(order[labels], labels, outputs=12)
    known(labels, labels, outputs=12)
    weak = torch.where(torch.arange(120) % 10 < 4, labels, labels.roll(37))  # right on .4 and wrong in no order
    known(weak, labels, outputs=12)


@pytest.mark.parametrize("seed", range(3))
def test_chance_is_no_other_order(seed: int) -> None:
    labels = torch.arange(50).repeat_interleave(2)  # of which an order that is fitted to all of them names many
    answers = labels[torch.randperm(100, generator=torch.Generator().manual_seed(seed))]
    known(torch.where(torch.arange(100) % 10 < 3, labels, answers), labels, outputs=50)


def test_a_model_without_finite_answers_is_told_so_not_that_it_guesses() -> None:
    with pytest.raises(ValueError, match="clean images are not finite"):
        check_known(Blind(), CleanSet(IMAGES, LABELS), mean=(0.5,) * 3, std=(0.25,) * 3, runtime=Runtime(device="cpu"))


def test_answers_at_random_in_the_right_numbers_are_a_guess() -> None:
    labels = torch.arange(4).repeat_interleave(torch.tensor([80, 10, 5, 5]))
    random = labels[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    with pytest.raises(ValueError, match=r"names 0\.\d+ of the 100 clean images rightly, as a guess might"):
        known(random, labels)
    half = torch.where(torch.arange(100) % 2 == 0, labels, random)
    known(half, labels)
