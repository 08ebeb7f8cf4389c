"""A case: one setting with its poisoned images, its truth, and its two twins, which stay on disk for all defences."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .. import io
from ..bench.evaluate import Answers, Cases, answers, evaluate, to_dict
from ..bench.truth import Truth
from ..data import Source
from ..defences import Task
from ..pipeline import train
from ..result import commit, short
from ..schema import Recipe
from ..session import Session
from ..types import NABPlan
from .cells import Cell, Setting, defended_recipe, key_of
from .given import in_memory, opened, split_off
from .sheets import contact_sheet

__all__ = ["Case", "Twins"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Twins:
    """What every cell of a setting is compared with.

    Args:
        undefended: Trained on everything.
        oracle: Trained on all but the poison.
        figures: ACC, ASR, RA, ASR* of each, as in result.json.
        seconds: What each training took.
        made: By which commit, and on what.
    """

    undefended: nn.Module
    oracle: nn.Module
    figures: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    made: dict[str, dict[str, str]]


class Case:
    """The only place of the grid that knows a setting's truth.

    Args:
        setting: What to make.
        out: The grid's folder; twins are kept in out/twins.
        work: A folder for files that nobody needs later.

    Raises:
        ValueError: Data that cannot be read, or cannot be poisoned like this.
    """

    def __init__(self, setting: Setting, out: Path, work: Path) -> None:
        self.setting, self.folder, self.work = setting, out / "twins", work
        self.shared: dict[str, tuple[Any, float]] = {}
        recipe = setting.recipe
        source = opened(recipe.data, recipe.model.in_chans)
        train_part, trusted = split_off(source, limit=recipe.data.limit, clean=setting.clean, seed=recipe.seed)
        self.session = Session(recipe, work / "attacker", resume=False)
        self.session.whole_source = train_part
        self.session.test_source = opened(recipe.data, recipe.model.in_chans, test=True)
        poisoned, truth = self.session.poisoned
        none = np.zeros(len(poisoned), dtype=bool)
        self.truth = truth or Truth(none, poisoned.labels, None, "all_to_one", none)
        self.given, self.trusted = in_memory(poisoned, "given"), in_memory(trusted, "trusted")

    @cached_property
    def cases(self) -> Cases:
        cases = self.session.cases()
        assert cases is not None  # cells_of refuses recipes without a test set
        return cases

    @cached_property
    def _triggered(self) -> Source | None:
        session = self.session
        return None if session.recipe.attack is None else session.triggered(session.test_source)[0]

    @cached_property
    def _name(self) -> str:
        """Of what is made for these very images: an attack paints others once its settings or its code change."""
        tested = self.session.test_source if self._triggered is None else self._triggered
        return f"{self.setting.name}-{key_of([self.setting.key, self.given.fingerprint, tested.fingerprint])}"

    def show(self, folder: Path) -> None:
        """Write the attack's contact sheet, where there is an attack: poison as it is trained on, then triggered test images."""
        session, path = self.session, folder / f"{self._name}.png"
        if self._triggered is None or path.exists():
            return
        poison = session.source.subset(np.flatnonzero(self.truth.poisoned))
        io.save_image(path, contact_sheet([(session.clean_source, poison), (session.test_source, self._triggered)]))

    def measured(self, model: nn.Module, given: Answers | None = None) -> dict[str, Any]:
        return to_dict(evaluate(model, self.cases, self.session.runtime, given=given))

    def answers(self, model: nn.Module) -> Answers:
        return answers(model, self.cases, self.session.runtime)

    @cached_property
    def oracle_answers(self) -> Answers:
        return self.answers(self.twins.oracle)

    def task(self, cell: Cell, folder: Path) -> Task:
        """All that the cell's defence is handed; the guard of rule 1.

        Raises:
            ValueError: A setting that no stage can use."""
        recipe = defended_recipe(cell)
        assert recipe.attack is None and recipe.data.test is None and recipe.data.truth is None
        twin, seconds = copy.deepcopy(self.twins.undefended), self.twins.seconds["undefended"]
        return Task(recipe, self.given, self.trusted, twin, seconds, folder, self.shared)

    @cached_property
    def oracle_plan(self) -> NABPlan:
        return dataclasses.replace(NABPlan.empty(self.given.labels), keep=~self.truth.poisoned)

    @cached_property
    def twins(self) -> Twins:
        """From disk where an earlier cell left them."""
        runtime, record = self.session.runtime, self.folder / f"{self._name}.json"
        undefended, made = self._twin(record.with_suffix(""), NABPlan.empty(self.given.labels))
        oracle, again = undefended, made
        if self.truth.poisoned.any():
            oracle, again = self._twin(self.folder / f"oracle-{self._kept_key()}", self.oracle_plan)
        figures: dict[str, Any] = io.load_json(record) if record.exists() else {}
        weights = [made["sha256"], again["sha256"]]
        if figures.pop("weights", None) != weights:  # others were trained since, as on another processor
            figures = {"undefended": self.measured(undefended), "oracle": self.measured(oracle)}
            io.save_json(record, {**figures, "weights": weights})
        for twin in (undefended, oracle):
            runtime.place(twin)
        headers = {"undefended": made, "oracle": again}
        seconds = {name: float(header["seconds"]) for name, header in headers.items()}
        by = {name: {key: header[key] for key in self._made if key in header} for name, header in headers.items()}
        return Twins(undefended, oracle, figures, seconds, by)

    def _twin(self, stem: Path, plan: NABPlan) -> tuple[nn.Module, dict[str, Any]]:
        """A twin, the seconds of its training, what made it and the hash of its file, from disk or trained."""
        weights = stem.with_name(f"{stem.name}.safetensors")
        network = self._learner.build()
        if weights.exists():
            tensors, header = io.load_tensors(weights)
            network.load_state_dict(tensors)
            for key, own in self._made.items():
                if (made := header.get(key, own)) != own:
                    whose = f"another {key} trained it, {made}, and this is {own}"
                    log.warning("%s: %s; delete %s to train all twins anew", weights.name, whose, self.folder)
            return network, {**header, "sha256": io.file_hash(weights)}
        begun = time.perf_counter()
        network = train(self._learner, plan, "twin", kept=False)
        header = {"seconds": time.perf_counter() - begun, **self._made}
        io.save_tensors(weights, dict(network.state_dict()), header)
        return network, {**header, "sha256": io.file_hash(weights)}

    @cached_property
    def _made(self) -> dict[str, str]:
        """What trains a twin, besides its settings."""
        return {"commit": short(commit()), "hardware": self.session.runtime.hardware()}

    @cached_property
    def _learner(self) -> Session:
        """A session on the same images as the defences', under the same names."""
        session = Session(_plain(self.setting.recipe), self.work / "twins", resume=False)
        session.whole_source = self.given
        session.rehearse()
        return session

    def _kept_key(self) -> str:
        """What the oracle is trained on and how: attacks that poison the same images have the same oracle, trained once."""
        kept = self.given.subset(np.flatnonzero(~self.truth.poisoned))
        recipe = self.setting.recipe.model_dump(mode="json", include={"model", "train", "runtime", "seed"})
        config = {"recipe": recipe, "data": _input(self.setting.recipe), "package": self.setting.config["package"]}
        return key_of({**config, "images": _content(kept)})


def _plain(recipe: Recipe) -> Recipe:
    """A recipe for training alone."""
    data = recipe.data.model_copy(update={"source": "given", "test": None, "limit": None, "options": {}})
    return recipe.model_copy(update={"attack": None, "data": data})


def _input(recipe: Recipe) -> dict[str, Any]:
    return recipe.data.model_dump(mode="json", include={"size", "mean", "std"})


def _content(source: Source) -> str:
    """Hash of all pixels and labels, in order."""
    digest = hashlib.sha256(source.labels.tobytes())
    for index in range(len(source)):
        digest.update(source.pixels(index).tobytes())
    return digest.hexdigest()
