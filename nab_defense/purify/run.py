"""purify: run a method, measure its candidates on images it did not see, and ship the best, or the original."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..changes import Universal
from ..clean import CleanSet, Pixels, logits_of
from ..runtime import Runtime, fixed_seed
from ..universal import PROBE_BATCH, Pool, pool_of, pursued, started
from .base import Candidates, Notes, Purifier, frozen

__all__ = ["PurifyResult", "count_outputs", "may_keep", "prepared", "purify"]

log = logging.getLogger(__name__)
Judge = Callable[[nn.Module], dict[str, Any]]
RADIUS, PATCH = 6.0, 5  # of the perturbations at 32 px, see universal.Pool
PROBES, PROBE_IMAGES = 6, 250
BATCHES = PROBE_BATCH, PROBE_BATCH // 2  # for perturbations that are made anew, and for those that go on
LEAST_GAIN = 0.1  # of the proxy: less is noise, and no repair
TIE = 0.02  # proxies this close are the same
DOUBT = 2.0  # standard errors: a loss that exceeds max_drop by less may be chance
TURNED = 0.5  # of the original's proxy: what leaves so much of it is better than it was, but not repaired


@dataclass(frozen=True, eq=False)
class PurifyResult:
    """What came of a purification; shares in [0, 1], measured on held-out images.

    Args:
        model: The repaired network; the original, untouched, where `status` is "rejected".
        status: "accepted" or "rejected".
        chosen: Name of the candidate that was taken.
        candidates: name, accuracy, standard error of its change, proxy, seconds of each.
        before, after: accuracy, proxy and its class, of the original and of what was taken; with suspects "obeyed", the share of
            these that are given their old label.
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
        """Accepted, and turned by perturbations in less than half as many images as the original was."""
        return self.status == "accepted" and not _still_turned(self.before, self.after)


class _Judge:
    """Held-out accuracy, and a proxy of ASR that needs no truth: how far universal perturbations still turn images.

    A backdoor is a change that turns images more easily than others do. So the perturbations are those that stand out on the
    original network: as they were made there, after some steps more on the candidate, and made anew on it, patches at the place
    that then promises the most. A network can learn to withstand a few given ones and keep its backdoor. Without labels, accuracy
    is what the original network expects it to be: the mean probability that it gives to the predictions."""

    def __init__(self, network: Pixels, fit: CleanSet, held: CleanSet, pool: Pool, runtime: Runtime) -> None:
        self.original, self.fit, self.held, self.runtime = network, fit, held, runtime
        chances = logits_of(network, held, runtime).softmax(1)
        self.trust = chances if held.labels is None else torch.eye(chances.shape[1])[held.labels]
        self.right = self.trust.gather(1, chances.argmax(1)[:, None])
        self.easiest = [one.copied() for one in pool.suspicious[:PROBES]]  # the method may climb on with its own
        self.order = torch.randperm(len(held), generator=torch.Generator().manual_seed(runtime.seed))  # folders come by class

    def __call__(self, network: nn.Module) -> dict[str, Any]:
        logits = logits_of(network, self.held, self.runtime)
        if not torch.isfinite(logits).all():
            return {"accuracy": 0.0, "error": 0.0, "proxy": 1.0, "class": 0}  # of no use, and without a slope to climb on
        predicted = logits.argmax(1)
        right = self.trust.gather(1, predicted[:, None])
        error = float((right - self.right).std(correction=0)) / len(right) ** 0.5
        probes = list(self.easiest)
        if network is not self.original:
            many, few = (self.fit.endless(n, runtime=self.runtime, seed=self.runtime.seed, augment=False) for n in BATCHES)
            for one in self.easiest:
                probes.append(started(network, one, many, self.runtime))
                probes.append(pursued(network, one, few, self.runtime))
        rates = [self._turned(network, predicted, one) for one in probes]
        worst = max(rates)
        return {"accuracy": float(right.mean()), "error": error, "proxy": worst, "class": probes[rates.index(worst)].wanted}

    def _turned(self, network: nn.Module, plain: Tensor, one: Universal) -> float:
        """Share of held-out images that the perturbation turns to its class, of a random few of those not given it anyway."""
        others = self.order[(plain != one.wanted)[self.order]][:PROBE_IMAGES].sort().values
        if not len(others):
            return 1.0  # a network that names everything alike is turned already
        turned = logits_of(network, self.held.take(others), self.runtime, one.painted).argmax(1)
        return float((turned == one.wanted).float().mean())


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
) -> PurifyResult:
    """Repair a model with a few clean images.

    A method that cannot go on, and raises ValueError on its way, ends there: what it offered until then is judged as ever.

    Args:
        model: Takes images normalised by mean and std; it is not changed.
        clean: Trusted images; labels only where the method needs them.
        method: One of `purifiers`.
        mean, std: Normalisation of the model's input, in [0, 1] units.
        runtime: Device, precision, seed.
        max_drop: Largest loss of held-out accuracy, in [0, 1]. Where no candidate that keeps to it is repaired (PurifyResult),
            one that is may be taken, if its loss may be as small for all that the held-out images can tell: few tell little.
        holdout: Share of the clean images that only selects.
        suspects: Accused images with the labels they were given; the method does not see them, and a network that still gives
            them those labels is judged as one that is turned.

    Raises:
        ValueError: The method cannot serve this network or these images; nothing was trained."""
    limits = {"max_drop": max_drop, "holdout": holdout}
    original, fit, held = prepared(model, clean, method, mean=mean, std=std, runtime=runtime, **limits)
    begun = time.perf_counter()
    pool = pool_of(original, fit, radius=RADIUS, patch=PATCH, runtime=runtime)
    judge = _with_suspects(_Judge(original, fit, held, pool, runtime), suspects, runtime)
    before = judge(original)
    selecting = time.perf_counter() - begun
    fixed_seed(runtime.seed)
    records: list[dict[str, Any]] = []
    stopped, notes = list[str](), Notes()
    best: dict[tuple[bool, bool], tuple[dict[str, Any], nn.Module]] = {}  # of those that are (still turned, above max_drop)
    candidates = method.candidates(copy.deepcopy(original), fit, pool=pool, runtime=runtime, notes=notes)
    for name, network in _up_to_failure(candidates, stopped):
        paused = time.perf_counter()
        record: dict[str, Any] = {"name": name, **judge(network), "seconds": paused - begun - selecting}
        records.append(record)
        log.info("%s: held-out accuracy %.3f, proxy %.3f", name, record["accuracy"], record["proxy"])
        kind = _still_turned(before, record), before["accuracy"] - record["accuracy"] > max_drop
        if may_keep(before, record, max_drop) and (kind not in best or _better(record, best[kind][0])):
            best[kind] = record, copy.deepcopy(network.get_submodule("model"))
        selecting += time.perf_counter() - paused
    seconds = {"method": time.perf_counter() - begun - selecting, "selection": selecting}
    rest: dict[str, Any] = {"seconds": seconds, "stopped": stopped[0] if stopped else None, **vars(notes)}
    for record, network in (best[kind] for kind in sorted(best)):
        if record["proxy"] <= before["proxy"] - LEAST_GAIN:
            return PurifyResult(network.eval(), "accepted", record["name"], records, before, record, **rest)
    return PurifyResult(model, "rejected", None, records, before, before, **rest)


def _up_to_failure(candidates: Candidates, stopped: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """The candidates; the method's own error ends them, and is put down in `stopped`."""
    try:
        yield from candidates
    except ValueError as error:
        stopped.append(str(error))


def may_keep(before: dict[str, Any], record: dict[str, Any], max_drop: float) -> bool:
    """Whether the loss of accuracy may be at most max_drop, for all that the held-out images can tell."""
    return bool(before["accuracy"] - record["accuracy"] <= max_drop + DOUBT * record["error"])


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
) -> tuple[Pixels, CleanSet, CleanSet]:
    """A copy of the model that takes pixels, the images to fit on, and those to judge by; arguments as in purify.

    Raises:
        ValueError: What purify would refuse."""
    original: Pixels = frozen(runtime.place(Pixels(copy.deepcopy(model), mean, std)))  # type: ignore[assignment]
    if not 0 < holdout < 1 or not 0 <= max_drop < 1:
        raise ValueError(f"holdout must be in (0, 1) and max_drop in [0, 1), got {holdout} and {max_drop}")
    for name in ("steps", "rounds", "batch_size"):
        if getattr(method, name, 1) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(method, name)}")
    _check_images(clean, count_outputs(original, clean.images[:2], runtime), method)
    fit, held = clean.split(holdout, runtime.seed)
    if len(fit) < method.least:
        raise ValueError(
            f"{len(fit)} clean images are left to fit on, {len(held)} being held out; {_name(method)} needs {method.least}"
        )
    method.check(original, runtime.put(clean.images[:2].float() / 255))
    return original, fit, held


def _with_suspects(judge: Judge, suspects: CleanSet | None, runtime: Runtime) -> Judge:
    """The judge, with a proxy of at least the share of the suspects that a network gives the labels they came with."""
    if suspects is None:
        return judge
    if suspects.labels is None or not len(suspects):
        raise ValueError("suspects must be images with the labels they were given, at least one")
    given = suspects.labels

    def judged(network: nn.Module) -> dict[str, Any]:
        record = judge(network)
        obeyed = float((logits_of(network, suspects, runtime).argmax(1) == given).float().mean())
        worse = {"proxy": obeyed, "class": int(given.mode().values)} if obeyed > record["proxy"] else {}
        return {**record, **worse, "obeyed": obeyed}

    return judged


def count_outputs(network: Pixels, images: Tensor, runtime: Runtime) -> int:
    """How many classes a network tells apart, found by running it.

    Args: images: a few, (B, C, H, W) uint8.

    Raises:
        ValueError: Images, normalisation, weights or output that no method could use."""
    if images.ndim != 4 or images.dtype != torch.uint8 or len(images) == 0:
        raise ValueError(f"clean images must be (N, C, H, W) uint8, N above 0, got {tuple(images.shape)} {images.dtype}")
    shape = "x".join(map(str, images.shape[1:]))
    for name in ("mean", "std"):
        values = network.get_buffer(name).flatten().tolist()
        if len(values) != images.shape[1]:
            raise ValueError(f"{name} has {len(values)} values, the images have {images.shape[1]} channels")
        if name == "std" and not all(value > 0 for value in values):
            raise ValueError(f"std must be positive, got {values}; for raw [0, 1] input it is 1")
    weights = network.get_submodule("model").state_dict()
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"the model's {broken[0]} holds values that are not finite ({len(broken)} such tensors); it cannot work")
    try:
        logits = logits_of(network, CleanSet(images), runtime)
    except Exception as error:  # forward passes raise anything
        raise ValueError(f"the model cannot take {shape} images: {' '.join(str(error).split())[:200]}") from error
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"the model gives {tuple(logits.shape)} for {len(images)} images, expected (images, classes)")
    return logits.shape[1]


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
    return type(method).__name__


def _still_turned(before: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether half of what turned the original is left, or more; nobody knows how much of the backdoor that is."""
    return bool(record["proxy"] >= TURNED * before["proxy"])


def _better(record: dict[str, Any], than: dict[str, Any]) -> bool:
    """A clearly lower proxy, or the same and more accurate."""
    gain = than["proxy"] - record["proxy"]
    return bool(gain > TIE or (gain > -TIE and record["accuracy"] > than["accuracy"]))
