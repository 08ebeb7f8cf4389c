"""purify: run a method, measure its candidates on images it did not see, and ship the best, or the original."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..clean import CleanSet, Pixels, logits_of
from ..kept import Kept, hashed
from ..runtime import Runtime, fixed_seed
from ..universal import Pool, pool_of
from .base import Candidates, Choice, Judge, Notes, Purifier, answers, count_outputs, frozen_pixels, hardly_turned, purifiers

__all__ = ["PurifyResult", "prepared", "purify"]

VERSION = version("nab_defense")
Judged = Callable[[nn.Module], dict[str, Any]]
LEAST_HELD = 10  # images that judge
RADIUS, PATCH = 6.0, 5  # of the perturbations at 32 px, see universal.Pool


@dataclass(frozen=True, eq=False)
class PurifyResult:
    """What came of a purification; shares in [0, 1], measured on held-out images.

    Args:
        model: The repaired network; the original, untouched, where `status` is "rejected".
        status: "accepted" or "rejected".
        chosen: Name of the candidate that was taken.
        candidates: name, accuracy, standard error of its change, proxy, seconds of each.
        before, after: accuracy on n images, proxy and its class, and by_class, the largest share of the images that is turned to
            each class that a perturbation was tried toward; of the original and of what was taken; with suspects "obeyed",
            the share of these that are given their old label.
        seconds: "method" and "selection".
        stopped: Why the method ended early: its loss was not finite, it did not recover; None where it went to its end.
        evidence, unlearned: What the method learned about the backdoor, see base.Notes.
    """

    model: nn.Module
    status: str
    chosen: str | None
    candidates: list[dict[str, Any]]
    before: dict[str, Any]
    after: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    stopped: str | None = None
    evidence: dict[str, Any] = field(default_factory=dict)
    unlearned: nn.Module | None = None

    @property
    def repaired(self) -> bool:
        """Accepted, and turned by perturbations in less than a sixth as many images as the original was."""
        return self.status == "accepted" and hardly_turned(self.before, self.after)


def purify(
    model: nn.Module,
    clean: CleanSet,
    method: Purifier,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    runtime: Runtime,
    max_drop: float = 0.05,
    holdout: float = 0.2,
    suspects: CleanSet | None = None,
    state: Path | None = None,
    resume: bool = False,
) -> PurifyResult:
    """Repair a model with a few clean images.

    A method that cannot go on, and raises ValueError on its way, ends there: what it offered until then is judged as ever.

    Args:
        model: Takes images normalised by mean and std; it is not changed.
        clean: Trusted images; labels only where the method needs them.
        method: One of `purifiers`.
        mean, std: Normalisation of the model's input, in [0, 1] units.
        runtime: Device, precision, seed.
        max_drop: Largest loss of held-out accuracy, in [0, 1]. Where no candidate that keeps to it is turned in less than
            half as many images as the original, one that is may be taken, if its loss may be as small for all that the held-out
            images can tell: few tell little.
        holdout: Share of the clean images that only selects.
        suspects: Accused images with the labels they were given; the method does not see them, and a network that still gives
            them those labels is judged as one that is turned.
        state: Folder for what is done so far; who calls deletes it, once the result is safe.
        resume: Go on with what a killed run left there; it ends as if it had not been killed.

    Raises:
        ValueError: The method cannot serve this network or these images, or `state` is another run's; nothing was trained."""
    limits = {"max_drop": max_drop, "holdout": holdout}
    original, fit, held = prepared(model, clean, method, mean=mean, std=std, runtime=runtime, **limits, suspects=suspects)
    answers(original, clean, runtime)
    told = None if state is None else _told(original, clean, suspects, runtime, method=method, **limits)
    kept = Kept(state, told, resume=resume)
    begun = time.perf_counter()
    pool = _pool(original, fit, kept, runtime)
    judge = _with_suspects(Judge(original, fit, held, pool, runtime), suspects, runtime)
    choice = Choice(kept.once("before", lambda: judge(original)), max_drop, kept)
    choice.seconds["selection"] += time.perf_counter() - begun
    fixed_seed(runtime.seed)
    stopped, notes, network = list[str](), Notes(), copy.deepcopy(original)
    begun = time.perf_counter()
    for name, candidate in _up_to_failure(
        method.candidates(network, fit, pool=pool, runtime=runtime, notes=notes, kept=kept), stopped
    ):
        offered = time.perf_counter()
        choice.seconds["method"] += offered - begun
        if name not in choice.known:
            judged = judge(candidate)
            choice.seconds["selection"] += time.perf_counter() - offered
            choice.add({"name": name, **judged, "seconds": choice.seconds["method"]}, candidate.get_submodule("model"))
        begun = time.perf_counter()
    choice.seconds["method"] += time.perf_counter() - begun
    rest: dict[str, Any] = {"seconds": choice.seconds, "stopped": stopped[0] if stopped else None, **vars(notes)}
    record, taken = choice.taken(network.get_submodule("model"))
    if taken is None:
        return PurifyResult(model, "rejected", None, choice.records, record, record, **rest)
    _as_trainable(taken.requires_grad_(True), model)
    return PurifyResult(taken.eval(), "accepted", record["name"], choice.records, choice.before, record, **rest)


def _as_trainable(taken: nn.Module, model: nn.Module) -> None:
    """Give a repaired network's weights the requires_grad that they have in the original, in place; what it adds stays."""
    for name, param in model.named_parameters(recurse=False):
        taken.get_parameter(name).requires_grad_(param.requires_grad)
    for name, child in model.named_children():
        part = taken.get_submodule(name)
        _as_trainable(part if type(part) is type(child) else part.get_submodule("module"), child)  # what was put around it


def _told(original: Pixels, clean: CleanSet, suspects: CleanSet | None, runtime: Runtime, **settings: Any) -> dict[str, Any]:
    """All that a purification depends on; JSON-able."""
    told = {name: repr(value) for name, value in {**settings, "runtime": runtime, "network": original}.items()}
    for name, images in (("clean", clean), ("suspects", suspects)):
        if images is not None:
            labels = {} if images.labels is None else {"labels": images.labels}
            told[name] = f"{hashed({'images': images.images, **labels})} pad={images.pad} hflip={images.hflip}"
    answers = logits_of(original, clean.take(torch.arange(2)), runtime)  # which also hang on code that has no weights
    seen = {"mean": original.mean, "std": original.std, "answers": answers, **original.state_dict()}
    machine = {"machine": runtime.hardware(), "torch": torch.__version__, "package": VERSION}
    return {**told, **machine, "model": hashed(seen)}


def _pool(original: Pixels, fit: CleanSet, kept: Kept, runtime: Runtime) -> Pool:
    """Made once: on a GPU it would not be the same again."""
    made = kept.once("pool", lambda: pool_of(original, fit, radius=RADIUS, patch=PATCH, runtime=runtime).state_dict())
    return Pool.restored(made, runtime)


def _up_to_failure(candidates: Candidates, stopped: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """The candidates; the method's own error ends them, and is put down in `stopped`."""
    try:
        yield from candidates
    except ValueError as error:
        stopped.append(str(error))


def prepared(
    model: nn.Module,
    clean: CleanSet,
    method: Purifier,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    runtime: Runtime,
    max_drop: float,
    holdout: float,
    suspects: CleanSet | None = None,
) -> tuple[Pixels, CleanSet, CleanSet]:
    """A copy of the model that takes pixels, the images to fit on, and those to judge by; arguments as in purify.

    Raises:
        ValueError: What purify would refuse."""
    original = frozen_pixels(model, mean, std, runtime)
    if not 0 < holdout < 1 or not 0 <= max_drop < 1:
        raise ValueError(f"holdout must be in (0, 1) and max_drop in [0, 1), got {holdout} and {max_drop}")
    _check_images(clean, count_outputs(original, clean.images[:2], runtime), method)
    fit, held = clean.split(holdout, runtime.seed)
    if len(fit) < method.least:
        raise ValueError(
            f"{len(fit)} clean images are left to fit on, {len(held)} being held out; {_name(method)} needs {method.least}"
        )
    if len(held) < LEAST_HELD:
        raise ValueError(f"{len(held)} clean images are left to judge by; give more, or raise holdout: at least {LEAST_HELD}")
    if suspects is not None:
        _check_suspects(suspects, clean)
    method.check(original, runtime.put(clean.images[:2].float() / 255))
    return original, fit, held


def _with_suspects(judge: Judged, suspects: CleanSet | None, runtime: Runtime) -> Judged:
    """The judge, with a proxy of at least the share of the suspects that a network gives the labels they came with."""
    if suspects is None:
        return judge
    given = suspects.labels
    assert given is not None  # see prepared

    def judged(network: nn.Module) -> dict[str, Any]:
        record = judge(network)
        obeyed = float((logits_of(network, suspects, runtime).argmax(1) == given).float().mean())
        worse = {"proxy": obeyed, "class": int(given.mode().values)} if obeyed > record["proxy"] else {}
        return {**record, **worse, "obeyed": obeyed}

    return judged


def _check_suspects(suspects: CleanSet, clean: CleanSet) -> None:
    if suspects.labels is None or not len(suspects):
        raise ValueError("suspects must be images with the labels they were given, at least one")
    theirs, ours = ((images.dtype, tuple(images.shape[1:])) for images in (suspects.images, clean.images))
    if theirs != ours:
        raise ValueError(f"suspects are {theirs[0]} images of {theirs[1]}, the clean images {ours[0]} of {ours[1]}")


def _check_images(clean: CleanSet, classes: int, method: Purifier) -> None:
    """Refuse images without the labels that the method needs, or with labels that are not the model's."""
    if clean.labels is None:
        if method.labelled:
            raise ValueError(f"{_name(method)} needs the labels of the clean images; give them, or choose another method")
        return
    if clean.labels.shape != clean.images.shape[:1] or clean.labels.min() < 0:
        raise ValueError(f"labels must be (N,) and not negative, got {tuple(clean.labels.shape)} for {len(clean)} images")
    counts = clean.labels.bincount(minlength=classes)
    if len(counts) > classes:
        raise ValueError(f"the clean images have labels up to {len(counts) - 1}, the model {classes} classes from 0")
    if method.labelled and counts.min() < 2:
        rarest = int(counts.argmin())
        raise ValueError(
            f"class {rarest} has {int(counts[rarest])} clean images; each of the {classes} needs two, to fit on and to judge by"
        )


def _name(method: Purifier) -> str:
    return next((name for name in purifiers.names() if purifiers.get(name) is type(method)), type(method).__name__)
