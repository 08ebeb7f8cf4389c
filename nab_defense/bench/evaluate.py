"""ACC, ASR, RA, and ASR after retuning, of a network, each with its sample size and interval."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import ranks
from ..runtime import Runtime, evaluating
from ..types import EvalResult
from .metrics import share
from .retune import Lesson, retuned

__all__ = ["Answers", "Cases", "answers", "evaluate", "predict", "to_dict"]

Loader = Iterable[tuple[Tensor, Tensor]]
Answers = dict[str, NDArray[np.bool_]]


@dataclass(frozen=True, eq=False)
class Cases:
    """What a network is tested on. Loaders yield (images, labels) batches in the order of the labels given here.

    Args:
        clean: Clean test images.
        clean_labels: (N,) int64, their labels.
        triggered: Test images with the trigger, none of the target class; None: no attack is known.
        wanted_labels: (M,) int64, what the attacker wants of them.
        true_labels: (M,) int64, what they show.
        lesson: What to retune on; None: nothing is retuned.
        triggers: (M,) int64, which of several triggers each of the images has; None: there is one.

    Raises:
        ValueError: Triggered images without both kinds of label.
    """

    clean: Loader
    clean_labels: NDArray[np.int64]
    triggered: Loader | None = None
    wanted_labels: NDArray[np.int64] | None = None
    true_labels: NDArray[np.int64] | None = None
    lesson: Lesson | None = None
    triggers: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.triggered is not None and (self.wanted_labels is None or self.true_labels is None):
            raise ValueError("triggered images need both wanted_labels and true_labels")


def predict(model: nn.Module, loader: Loader, runtime: Runtime) -> NDArray[np.int64]:
    """The predicted class of every image, (N,) int64, in the loader's order.

    The model must be on the runtime's device. It runs in eval mode; every module then gets its own mode back. Of several ranks,
    each computes some of the batches.

    Raises:
        ValueError: Outputs that are not finite: the first class would be taken for their largest.
    """
    predicted: list[Tensor] = []
    with evaluating(model), torch.inference_mode(), runtime.autocast():
        for _, images, _ in ranks.deal(loader):
            logits = model(runtime.put(images))
            predicted.append(logits.argmax(dim=1).where(logits.isfinite().all(dim=1), -1))
    # One transfer at the end: fetching each batch would make a GPU wait for it.
    sizes = [len(part) for part in predicted]
    own = torch.cat(predicted).cpu().split(sizes) if predicted else []
    found = ranks.in_order(own)
    classes = torch.cat(found).numpy() if found else np.zeros(0, dtype=np.int64)
    if dead := np.count_nonzero(classes < 0):
        raise ValueError(
            f"the network's outputs for {dead} of {len(classes)} images are not finite; train it at a lower learning rate, "
            "or with runtime.precision=float32"
        )
    return classes


def answers(model: nn.Module, cases: Cases, runtime: Runtime) -> Answers:
    """Image by image what "acc", and with triggered images "asr" and "ra", are shares of: (N,) bool and (M,) bool.

    Raises:
        ValueError: A loader yields another number of images than there are labels, or see predict."""
    found = {"acc": _agreement(predict(model, cases.clean, runtime), cases.clean_labels)}
    if cases.triggered is not None and cases.wanted_labels is not None and cases.true_labels is not None:
        predicted = predict(model, cases.triggered, runtime)
        found |= {"asr": _agreement(predicted, cases.wanted_labels), "ra": _agreement(predicted, cases.true_labels)}
    return found


def evaluate(model: nn.Module, cases: Cases, runtime: Runtime, *, given: Answers | None = None) -> EvalResult:
    """Measure a network as it is; a DefendedModel stamps its input by itself.

    Args: given: Its answers, where they are known already.

    Returns:
        ACC: share of clean images predicted right. ASR: share of triggered images predicted as the attacker wants.
        RA: share of triggered images predicted right all the same. Retuned: ASR of a copy that was retuned on the lesson, on the
        triggered images that are not in it. Worst, least: ASR of the trigger that works best, and least, of several. ASR and RA
        are None without triggered images, retuned also without a lesson.

    Raises:
        ValueError: A loader yields another number of images than there are labels, or none; or see predict.
    """
    own, again = answers(model, cases, runtime) if given is None else given, None
    acc, obeyed = share(own["acc"]), own.get("asr")
    if obeyed is None or cases.triggered is None or cases.wanted_labels is None:
        return EvalResult(acc)
    if cases.lesson is not None:
        retaught = predict(retuned(model, cases.lesson, runtime), cases.triggered, runtime)
        again = share(np.delete(_agreement(retaught, cases.wanted_labels), cases.lesson.rows))
    worst = least = None
    if (which := cases.triggers) is not None:
        each = sorted((share(obeyed[which == one]) for one in np.unique(which)), key=lambda rate: rate.value)
        worst, least = each[-1], each[0]
    return EvalResult(acc, share(obeyed), share(own["ra"]), again, worst, least)


def to_dict(result: EvalResult) -> dict[str, dict[str, float]]:
    """{"acc": {"value", "n", "low", "high"}, "asr", "ra", "retuned", "worst", "least": the same}, without what is None."""
    return {name: rate for name, rate in asdict(result).items() if rate is not None}


def _agreement(predicted: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    if len(predicted) != len(labels):
        raise ValueError(f"the loader gave {len(predicted)} images for {len(labels)} labels; does it drop the last batch?")
    return np.asarray(predicted == labels)
