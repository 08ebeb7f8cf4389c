"""The repair of a trained model: trusted images in, a purifier on what is to be shipped, and what came of it in words."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from . import checkpoint, io, ranks
from .clean import CleanSet, logits_of
from .data import Source, build_transform
from .disk import disk_error
from .kept import Foreign, forget
from .plan import COVERED, relabelled
from .purify import PurifyResult, purifiers, purify
from .purify.base import LEAST_GAIN, hardly_turned, may_keep
from .purify.rnp import suspicion
from .purify.run import prepared
from .runtime import Runtime
from .schema import PurifyStage
from .session import Session
from .types import NABPlan

__all__ = ["Repair", "Trusted", "in_words", "outcome", "ranking", "read_clean", "read_suspects", "repair", "trusted_images"]

log = logging.getLogger(__name__)
RANKED_AT_ONCE = 4096  # images in memory
MAX_SUSPECTS = 500  # accused images that help to judge
ACCEPTED = "accepted"


@dataclass(frozen=True, eq=False)
class Trusted:
    """A recipe's purify section with its images, and the fingerprint of what they were read from."""

    stage: PurifyStage
    images: CleanSet
    fingerprint: str


@dataclass(frozen=True, eq=False)
class Repair:
    """What came of a repair.

    Args:
        model: To be shipped: the repaired one, or the original, untouched, where none was accepted.
        record: What result.json says of it; "status" is "accepted" or "rejected", "text" is for people.
    """

    model: nn.Module
    record: dict[str, Any]

    @property
    def accepted(self) -> bool:
        return bool(self.record["status"] == ACCEPTED)

    @property
    def believed(self) -> bool:
        """Hardly anything turns the repaired model still."""
        return self.accepted and hardly_turned(self.record["before"], self.record["after"])


def read_clean(
    source: Source, *, size: int, limit: int | None, labelled: bool, hflip: float, seed: int
) -> tuple[Source, CleanSet]:
    """Trusted images, held in memory.

    Args:
        source: What to draw from.
        size: Edge in pixels.
        limit: Draw a random so many, of each class as many where `labelled`; None: all.
        labelled: Read the labels.
        hflip: Probability of a flip in augmented batches.
        seed: Of the draw.

    Returns: what was drawn, as a source and as a set; of images that are there twice the first, as what a method trained on must
        not judge it."""
    drawn = _draw(source, limit, seed, balanced=labelled)
    images = CleanSet.read(drawn.view(build_transform("none", size)), labelled=labelled, hflip=hflip)
    rows = images.distinct()
    if len(rows) < len(images):
        log.warning("%s: %d of %d images are repeats, and are left out", source.name, len(images) - len(rows), len(images))
        drawn, images = drawn.subset(rows.numpy()), images.take(rows)
    return drawn, images


def _draw(source: Source, count: int | None, seed: int, *, balanced: bool) -> Source:
    """A random `count` of the images, of each class as many where `balanced`; all of them where there are not more."""
    if not balanced or count is None or count >= len(source):
        return source.limited(count, seed)
    order = np.random.default_rng(seed).permutation(len(source))
    turn = np.empty(len(source), dtype=np.int64)  # the how-manieth of its class each image is
    for label in range(len(source.classes)):
        rows = order[source.labels[order] == label]
        turn[rows] = np.arange(len(rows))
    return source.subset(np.sort(order[np.argsort(turn[order], kind="stable")][:count]))


def trusted_images(session: Session) -> Trusted | None:
    """Read the images of the recipe's purify section; None where it asks for no repair.

    Raises:
        ValueError: What the purifier would refuse after training: images, labels, or a network it cannot serve."""
    stage, recipe = session.recipe.purify, session.recipe
    if stage is None or stage.when == "never":
        return None
    source = session.further_source(stage.clean, labelled=stage.labelled)
    drawn, images = read_clean(
        source, size=session.size, limit=stage.clean_limit, labelled=stage.labelled, hflip=recipe.train.hflip, seed=recipe.seed
    )
    method = purifiers.create(stage.method, **stage.params)
    try:
        prepared(session.build(), images, method, **_settings(session, stage))
    except ValueError as error:
        raise ValueError(f"purify: {error}") from error
    return Trusted(stage, images, drawn.fingerprint)


def _settings(session: Session, stage: PurifyStage) -> dict[str, Any]:
    mean, std = session.normalization
    return {"mean": mean, "std": std, "runtime": session.runtime, "max_drop": stage.max_drop, "holdout": stage.holdout}


def repair(session: Session, trusted: Trusted, shipped: nn.Module, plan: NABPlan) -> Repair:
    """Purify the model that is to be shipped, or take up what an interrupted run of this recipe left of that.

    Of several ranks the first does it alone, from a few images; the others read what it leaves.

    Args:
        trusted: What to repair with.
        shipped: The model, with its stamp where it has one; it is not changed.
        plan: What training changed; the relabelled show whether a candidate still obeys their old labels.
    """
    told, weights, unfinished = (session.stages / name for name in ("purified.json", "purified.safetensors", "purify"))

    def leave() -> dict[str, Any]:
        if session.resume and told.exists() and io.load_json(told)["data"]["fingerprint"] == trusted.fingerprint:
            forget(unfinished)
            return io.load_json(told)
        made = _repaired(session, trusted, shipped, plan, unfinished)
        if not made.record["before"]:
            return made.record  # it broke, and may be tried again
        if made.accepted:
            mean, std = session.normalization
            facts = {"classes": session.source.classes, "input_size": session.size, "verdict": None}
            checkpoint.save(weights, made.model, session.network(), mean=mean, std=std, **facts)
        io.save_json(told, made.record)
        forget(unfinished)
        return made.record

    record = ranks.on_first(leave)
    if record["status"] != ACCEPTED:
        return Repair(shipped, record)
    return Repair(session.runtime.place(checkpoint.load(weights)), record)


def _repaired(session: Session, trusted: Trusted, shipped: nn.Module, plan: NABPlan, unfinished: Path) -> Repair:
    stage, images = trusted.stage, trusted.images
    method: Any = purifiers.create(stage.method, **stage.params)
    n_fit, n_held = (len(part) for part in images.split(stage.holdout, session.runtime.seed))
    data = {"source": stage.clean, "fingerprint": trusted.fingerprint, "n_fit": n_fit, "n_held": n_held}
    record = {**stage.model_dump(exclude={"clean"}), "params": dataclasses.asdict(method), "data": data}
    given: dict[str, Any] = {**_settings(session, stage), "suspects": _accused(session, plan), "state": unfinished}
    try:
        try:
            found = purify(shipped, images, method, **given, resume=session.resume)
        except Foreign:  # of other images, say; what was trained before stands
            found = purify(shipped, images, method, **given)
    except Exception as error:  # out of memory, say: the model that was trained is shipped all the same
        if isinstance(error, OSError) or disk_error(error):
            raise  # which a later stage would meet, too
        log.error("the repair failed", exc_info=error)
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        found = PurifyResult(shipped, "rejected", None, [], {}, {}, stopped=why)
    text = in_words(found, stage.method, stage.max_drop, instead="the model is shipped as it was")
    return Repair(found.model, {**outcome(found), **record, "text": text})


def _accused(session: Session, plan: NABPlan) -> CleanSet | None:
    """Suspects that were given another label, with the labels they came with; None where there are none."""
    rows = np.flatnonzero(relabelled(plan))
    return _some(session.source, rows, size=session.size, seed=session.recipe.seed) if len(rows) else None


def read_suspects(path: Path, source: Source, *, size: int, seed: int) -> CleanSet:
    """The images that a scan gave another label than they came with, some hundreds at most, with the label they came with.

    Args:
        path: suspects.csv, as `nab scan` and `nab train` leave it.
        source: The training images it names.
        size: Edge in pixels.
        seed: Of the draw, where there are more.

    Raises:
        ValueError: It names none, or images that the source does not have."""
    places = {name: index for index, name in enumerate(source.ids)}
    rows = [row for row in io.load_csv(path, ("id", "label", "proposed", "action")) if row["action"] != COVERED]
    agree = Counter(row["label"] for row in rows if row["proposed"] == row["label"])
    whole = Counter(row["label"] for row in rows)
    # of clean-label poison, which mostly shows its label, the model is right to give it
    listed = [row["id"] for row in rows if row["proposed"] != row["label"] and 2 * agree[row["label"]] <= whole[row["label"]]]
    if not listed:
        raise ValueError(f"{path} gives no image another label, so that there is nothing to judge by; leave it out")
    unknown = [name for name in listed if name not in places]
    if unknown:
        raise ValueError(f"{path} names {len(unknown)} images that {source.name} lacks, first {min(unknown)!r}")
    return _some(source, np.array(sorted(places[name] for name in listed)), size=size, seed=seed)


def _some(source: Source, rows: NDArray[np.int64], *, size: int, seed: int) -> CleanSet:
    return CleanSet.read(source.subset(rows).limited(MAX_SUSPECTS, seed).view(build_transform("none", size)))


def outcome(found: PurifyResult) -> dict[str, Any]:
    """Everything in it but the networks, for result.json."""
    names = [field.name for field in dataclasses.fields(found) if field.name not in ("model", "unlearned")]
    return {name: getattr(found, name) for name in names}


def ranking(original: nn.Module, unlearned: nn.Module, source: Source, *, size: int, runtime: Runtime) -> NDArray[np.float32]:
    """(N,) how suspicious each training image is, higher = more: how well it was kept while clean images were forgotten.

    Args:
        original, unlearned: Take pixels; the second is PurifyResult.unlearned.
        source: The training images with the labels they were given.
        size: Edge in pixels."""
    found = []
    for rows in torch.arange(len(source)).split(RANKED_AT_ONCE):
        some = CleanSet.read(source.subset(rows.numpy()).view(build_transform("none", size)))
        assert some.labels is not None
        found.append(suspicion(logits_of(original, some, runtime), logits_of(unlearned, some, runtime), some.labels))
    return torch.cat(found).numpy()


def in_words(found: PurifyResult, method: str, max_drop: float, *, instead: str) -> str:
    """What came of it; "turned" stands in for the unknown ASR.

    Args: instead: What was done where no candidate was taken."""
    ended = "" if found.stopped is None else f" It ended early: {found.stopped}."
    if found.chosen is not None:
        lost = found.before["accuracy"] - found.after["accuracy"] > max_drop
        doubt = f"; that is above max_drop={max_drop}, but by no more than so few images leave to chance" if lost else ""
        start = "Repaired" if found.repaired else "Not repaired, though improved,"
        return (
            f"{start} by {method}, {found.chosen}: {_change(found.before, found.after)}{doubt}. "
            f"What the attacker's own trigger does cannot be told without it.{ended}"
        )
    if not found.candidates:
        return f"Not repaired, {instead}: {found.stopped or f'{method} gave no candidate'}."
    kept = [row for row in found.candidates if may_keep(found.before, row, max_drop)]
    best = min(kept, key=lambda row: row["proxy"]) if kept else max(found.candidates, key=lambda row: row["accuracy"])
    hardly = kept and found.before["proxy"] - best["proxy"] < LEAST_GAIN
    why = "is turned hardly less" if hardly else f"loses more than max_drop={max_drop} of accuracy"
    return f"Not repaired, {instead}: even the best candidate, {best['name']}, {why}; {_change(found.before, best)}.{ended}"


def _change(before: dict[str, float], after: dict[str, float]) -> str:
    others = ", or of suspects that are given their old label," if "obeyed" in before else ""
    accuracy = f"on {before['n']} held-out images accuracy goes from {before['accuracy']:.3f} to {after['accuracy']:.3f}"
    return (
        f"{accuracy}, and the share of images that a universal perturbation turns{others} from {before['proxy']:.3f} to "
        f"{after['proxy']:.3f}"
    )
