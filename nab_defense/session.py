"""Session: what the stages of one run share: sources, networks, loaders, files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from . import io, ranks
from .bench.attacks import Attack as PaintedAttack
from .bench.attacks import JointAttack, attacks
from .bench.evaluate import Cases
from .bench.poison import Truth, painted_by, poison_source, read_truth, triggered_source
from .bench.retune import draw_lesson
from .bench.trigger import load_trigger, prepared, save_trigger, warn_if_shrunk
from .checkpoint import Network
from .data import Distortion, Source, open_source
from .loaders import Loaders
from .methods import check_methods
from .registry import difference
from .runtime import Runtime, fixed_seed
from .scan import features_and_logits
from .schema import Attack, Model, Recipe, Schedule
from .stamp import Stamp
from .train import TrainConfig, build_optimizer
from .types import NABPlan

__all__ = ["Session"]

READ, WIDE = 512, 64  # images a batch where they are only read, and the widest of which that many are


class Session:
    """One run of a recipe in a folder.

    Args:
        recipe: What to run.
        out: The run's folder; created.
        resume: Keep finished stages and training states found there.

    Raises:
        ValueError: A setting that no stage can use, a folder that cannot be written, or `resume` on a folder that another
            recipe made. Nothing was written or read yet.
    """

    def __init__(self, recipe: Recipe, out: Path, *, resume: bool) -> None:
        self.recipe, self.out, self.resume = recipe, out, resume
        self.stages = out / "stages"
        self.record, self.finished = self.stages / "recipe.yaml", self.stages / "finished.json"
        self.settings: dict[str, Any] = json.loads(recipe.model_dump_json())
        io.check_folder(out)
        if resume and self.stages.exists():
            if not self.record.exists():
                raise ValueError(f"{self.stages} does not say which recipe it is of; use another --out, or leave out --resume")
            left = io.load_yaml(self.record) or {}
            differing = sorted(key for key in {*self.settings, *left} if self.settings.get(key) != left.get(key))
            if differing:
                raise ValueError(
                    f"{out} holds a run with another {', '.join(differing)}; set it back, use another --out, "
                    "or leave out --resume to start over (what was trained there is lost)"
                )
        check_methods(recipe)
        self.runtime = Runtime(**recipe.runtime.model_dump(), seed=recipe.seed)
        self.stamp = Stamp(**recipe.stamp.model_dump())
        self.schedule = train_config(recipe.train)
        ranks.check_batch(self.schedule.batch_size)

    def claim(self, read: dict[str, str]) -> dict[str, Any] | None:
        """Take the folder. What an earlier run shipped there stays until this one has all of its own.

        Args: read: Fingerprints of what the run reads, by its keys in the recipe.

        Returns: The result, where the run to resume was finished."""
        self.loaders.store.record = self.stages / "held.json"  # which nothing touches before it trains
        return ranks.on_first(lambda: self._claim(read))

    def _claim(self, read: dict[str, str]) -> dict[str, Any] | None:
        if self.resume and self.record.exists():
            if self.finished.exists() and all((self.out / name).exists() for name in ("model.safetensors", "result.json")):
                left, result = io.load_json(self.finished), dict[str, Any](io.load_json(self.out / "result.json"))
                if changed := [key for key, fingerprint in read.items() if left.get(key) != fingerprint]:
                    raise ValueError(f"{', '.join(changed)} changed since the run in {self.out}; leave out --resume to run again")
                return result
        elif self.stages.exists():
            if not self.record.exists() and any(self.stages.iterdir()):
                raise ValueError(f"{self.stages} is not of a run, and would be deleted; name another --out")
            shutil.rmtree(self.stages)
        elif (self.out / "model.safetensors").exists():
            raise ValueError(f"{self.out} holds a model that is not of a run, and would be overwritten; name another --out")
        io.save_yaml(self.record, self.settings)
        return None

    def rehearse(self) -> None:
        """Try what comes late in a run on two blank images: the networks, the stamp, the trusted images.

        Raises:
            ValueError: What would fail, before anything is trained or written."""
        size, recipe = self.size, self.recipe
        if len(self.source) < 2:
            raise ValueError(f"{self.source.name} gives {len(self.source)} training image, two are the least; raise data.limit")
        self.stamp.region(size, size)
        if recipe.relabel.name == "trusted":
            self.trusted_source  # noqa: B018
        for model in filter(None, (recipe.model, recipe.scan.model, recipe.relabel.encoder)):
            network = self.build(model).eval()
            blank = torch.zeros(2, recipe.model.in_chans, size, size)
            try:
                with torch.inference_mode(), self.runtime.autocast():
                    features_and_logits(network, self.runtime.put(blank))
            except Exception as error:  # forward passes raise anything, timm's often AssertionError
                reason = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"{model.name!r} cannot take {recipe.model.in_chans}x{size}x{size} images: {reason}; "
                    "set data.size to what it takes, or choose another model"
                ) from error
            if model is recipe.model:
                build_optimizer(network, self.schedule, self.runtime)

    # Data

    @cached_property
    def whole_source(self) -> Source:
        data = self.recipe.data
        return open_source(data.source, channels=self.recipe.model.in_chans, strict=data.strict, **data.options)

    @cached_property
    def clean_source(self) -> Source:
        return self.whole_source.limited(self.recipe.data.limit, self.recipe.seed)

    @cached_property
    def poisoned(self) -> tuple[Source, Truth | None]:
        """The training source, poisoned where the recipe says so, and the truth where it is known."""
        attack, source, path = self.recipe.attack, self.clean_source, self.recipe.data.truth
        truth = None
        if path is not None:
            number = {name: index for index, name in enumerate(self.whole_source.ids)}
            truth = read_truth(Path(path).expanduser(), self.whole_source).subset([number[name] for name in source.ids])
        if attack is None or not attack.poison:
            return source, truth
        target, seed = _target(attack), self.recipe.attack_seed
        return poison_source(source, self.attack, rate=attack.rate, target=target, mode=attack.mode, seed=seed)

    @cached_property
    def attack(self) -> PaintedAttack:
        """The attack of training and test: with what it learned from the training images that it poisons, or from its file."""
        attack = self.recipe.attack
        assert attack is not None  # asked for where there is one
        made, target, seed = attacks.create(attack.name, **attack.params), _target(attack), self.recipe.attack_seed
        warn_if_shrunk(made, self.clean_source, self.size)
        if attack.trigger is not None:
            return load_trigger(Path(attack.trigger).expanduser(), made, target=target)
        return prepared(made, self.clean_source, target=target, seed=seed, runtime=self.runtime) if attack.poison else made

    @property
    def source(self) -> Source:
        return self.poisoned[0]

    @property
    def truth(self) -> Truth | None:
        return self.poisoned[1]

    @cached_property
    def test_source(self) -> Source:
        """The test images of data.test, all of them."""
        data = self.recipe.data
        assert data.test is not None  # asked for where there is a test set
        return open_source(
            data.test, split=data.test_split, channels=self.recipe.model.in_chans, strict=data.strict, **data.options
        )

    @cached_property
    def trusted_source(self) -> Source:
        """The verified images of relabel.trusted."""
        name = self.recipe.relabel.trusted
        assert name is not None  # check_methods
        return self.further_source(name)

    def further_source(self, name: str, *, labelled: bool = True) -> Source:
        """Images beside the training ones, read as these are, for the same network.

        Raises:
            ValueError: They have other classes, where their labels are to be used, or cannot be read."""
        data = self.recipe.data
        source = open_source(name, channels=self.recipe.model.in_chans, strict=data.strict, labelled=labelled, **data.options)
        if labelled and source.classes != self.source.classes:
            told = difference(source.classes, self.source.classes)
            raise ValueError(f"{name} has other classes than the training data: {told}")
        return source

    @cached_property
    def size(self) -> int:
        """Edge of the network's input: the recipe's, or that of the images, at most 224."""
        if self.recipe.data.size is not None:
            return self.recipe.data.size
        return min(224, self.clean_source.edge())

    @cached_property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of the network's input: the recipe's, or those of timm's configuration."""
        mean, std, channels = self.recipe.data.mean, self.recipe.data.std, self.recipe.model.in_chans
        if mean is None or std is None:
            config: dict[str, Any] = self.network().build().pretrained_cfg  # type: ignore[assignment]
            mean, std = tuple(config["mean"]), tuple(config["std"])
            if channels == 1:
                mean, std = (float(np.mean(mean)),), (float(np.mean(std)),)
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise ValueError(f"data.{name} has {len(values)} values, the model takes {channels} channels")
        if min(std) <= 0:
            raise ValueError(f"data.std must be positive, got {list(std)}")
        if not 0 <= min(mean) <= max(mean) <= 1:
            raise ValueError(f"data.mean is in [0, 1], as pixels are, got {[*mean]}, with data.std {[*std]}; divide by 255")
        return mean, std

    def cases(self) -> Cases | None:
        """The test images, plain and triggered; None where the recipe names no test set."""
        data, seed = self.recipe.data, self.recipe.seed
        if data.test is None:
            return None
        if self.test_source.classes != self.source.classes:
            told = difference(self.test_source.classes, self.source.classes)
            raise ValueError(f"{data.test} has other classes than {data.source}: {told}")
        test = self.test_source.limited(data.test_limit, seed)
        if self.recipe.attack is None:
            return Cases(self.ordered(test), test.labels)
        triggered, true = self.triggered(test)
        lesson = draw_lesson(test, triggered, self.ordered, seed=seed)
        which = painted_by(triggered) if isinstance(self.attack, JointAttack) else None
        return Cases(self.ordered(test), test.labels, self.ordered(triggered), triggered.labels, true, lesson, which)

    def triggered(self, test: Source) -> tuple[Source, NDArray[np.int64]]:
        """These images with the attack's trigger, and what they show; see triggered_source."""
        attack = self.recipe.attack
        assert attack is not None  # asked for where there is one
        return triggered_source(test, self.attack, target=_target(attack), mode=attack.mode, seed=self.recipe.seed)

    def save_trigger(self) -> None:
        """Write what the attack learned to trigger.safetensors, for `nab evaluate`; no file where it learned nothing."""
        learned = None if self.recipe.attack is None else self.attack
        save_trigger(self.out / "trigger.safetensors", learned, target=_target(self.recipe.attack))

    # Loaders

    @cached_property
    def loaders(self) -> Loaders:
        (mean, std), train = self.normalization, self.recipe.train
        given: dict[str, Any] = {"hflip": train.hflip, "distortion": Distortion(train.color_jitter, train.erase)}
        return Loaders(size=self.size, mean=mean, std=std, **given, stamp=self.stamp, runtime=self.runtime)

    @property
    def _read(self) -> int:
        return max(32, READ * WIDE**2 // max(self.size, WIDE) ** 2)

    def ordered(self, source: Source) -> Any:
        """Batches of a source in order, without augmentation."""
        return self.loaders(source, "none", self._read, training=False)

    def scan_loader(self, source: Source) -> Any:
        """Shuffled batches for the scan's training, without augmentation."""
        return self.loaders(source, "none", self.recipe.scan.batch_size, training=True)

    def train_loader(self, plan: NABPlan, augment: str) -> Any:
        """Shuffled, augmented batches of the source as a plan wants them; of several ranks each gets its part of every batch."""
        return self.loaders(self.source, augment, self.schedule.batch_size, training=True, plan=plan, split=True)

    def relabel_loader(self, labels: NDArray[np.int64], keep: NDArray[np.bool_], training: bool) -> Any:
        """Batches of the training images under other labels, for a relabeler that trains."""
        source = self.source.replaced(labels=labels, load=self.source.load, change="relabel").subset(np.flatnonzero(keep))
        augment = "none" if not training else self.recipe.train.augment
        return self.loaders(source, augment, self.schedule.batch_size if training else self._read, training=training)

    # Networks

    def network(self, model: Model | None = None) -> Network:
        model = model or self.recipe.model
        classes = len(self.clean_source.classes)
        return Network(model.name, classes, model.in_chans, model.small_stem, model.pretrained, dict(model.kwargs))

    def build(self, model: Model | None = None) -> nn.Module:
        """A fresh network; the same one every time, so that arms of one run start alike."""
        fixed_seed(self.recipe.seed)
        return self.runtime.place(self.network(model).build())


def train_config(schedule: Schedule) -> TrainConfig:
    settings = schedule.model_dump()
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**{key: value for key, value in settings.items() if key in known})


def _target(attack: Attack | None) -> int | None:
    return attack.target if attack is not None and attack.mode == "all_to_one" else None
