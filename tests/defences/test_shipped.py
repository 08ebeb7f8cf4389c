"""What each defence ships, on one small task whose scan is given: it finds all of the poison."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nab_defense.bench.truth import Truth
from nab_defense.defences import Outcome, Task, defences, pdb, repaired
from nab_defense.defences.pdb import MappedBack
from nab_defense.defended import DefendedModel
from nab_defense.grid import cells_of, load_grid
from nab_defense.grid.case import Case
from nab_defense.grid.cells import defended_recipe
from nab_defense.pipeline import train
from nab_defense.purify import PurifyResult
from nab_defense.scan import Scan
from nab_defense.types import NABPlan
from tests.digits_runs import BLEND, TINY
from tests.grid.small import RECIPE, small_grid

PLAIN = 2.0  # seconds that ordinary training is said to have taken
SHARE = 0.2  # of the images is poisoned
TRAIN = {**RECIPE["train"], "epochs": 10, "batch_size": 16}  # after which a network knows 200 trusted images
SECTIONS: dict[str, Any] = {
    "recipe": {**RECIPE, "train": TRAIN, "fraction": SHARE, "runtime": {"device": "cpu", "precision": "float32", "threads": 1}},
    "networks": {"resnet": {"model": {**TINY["model"], **BLEND["model"]}}},
    "rates": [SHARE],
    "clean": 200,
}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Truth]:
    folder = tmp_path_factory.mktemp("task")
    (cell,) = cells_of(load_grid(small_grid(folder, defences={"none": None}, **SECTIONS)))
    case = Case(cell.setting, folder, folder / "work")
    task = Task(defended_recipe(cell), case.given, case.trusted, nn.Identity(), PLAIN, folder / "task")
    plain = train(task.session(), NABPlan.empty(case.given.labels), "plain", kept=False)
    return dataclasses.replace(task, undefended=plain), case.truth


@pytest.fixture
def defend(known: tuple[Task, Truth], make_scan: Callable[..., Scan]) -> Callable[..., Outcome]:
    """defend(name, **settings): an outcome; the undefended network is as it was."""
    task, truth = known
    labels = task.source.labels
    logits = np.eye(10)[labels] * np.where(truth.poisoned, 9, 3)[:, None]  # of poison the loss is lowest
    seen = dataclasses.replace(make_scan(np.zeros((len(labels), 2)), labels, logits), fingerprint=task.source.fingerprint)

    def made(name: str, **settings: Any) -> Outcome:
        fresh = dataclasses.replace(task, shared={})
        fresh.remember("scan", lambda: (seen, task.undefended))
        before = {key: value.clone() for key, value in task.undefended.state_dict().items()}
        outcome = defences.create(name, **settings).defend(fresh)
        assert same(before, task.undefended.state_dict())
        return outcome

    return made


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@torch.inference_mode()
def losses(model: nn.Module, task: Task) -> np.ndarray:
    """Of the labels that the training images came with."""
    batches = task.session().ordered(task.source)
    return torch.cat(
        [nn.functional.cross_entropy(model.eval()(images), labels, reduction="none") for images, labels in batches]
    ).numpy()


def test_undefended_is_the_network_of_ordinary_training(known: tuple[Task, Truth], defend: Callable[..., Outcome]) -> None:
    outcome = defend("none")
    assert outcome.model is known[0].undefended and outcome.seconds == {"train": PLAIN}
    assert outcome.plan is not None and not outcome.plan.changed.any()  # it changes nothing, sample by sample


def test_the_papers_rule_names_suspects_as_trusted_images_do(known: tuple[Task, Truth], defend: Callable[..., Outcome]) -> None:
    (task, truth), outcome = known, defend("nab_paper")
    plan = outcome.plan
    assert plan is not None and np.array_equal(plan.suspect, truth.poisoned) and plan.keep.all()
    right = (plan.new_labels == truth.true_labels)[truth.poisoned].mean()
    assert right > 0.5 and (plan.new_labels == plan.labels)[~truth.poisoned].all()
    assert isinstance(outcome.model, DefendedModel) and losses(outcome.model, task)[truth.poisoned].mean() > 1
    assert not same(outcome.model.model.state_dict(), task.undefended.state_dict())
    assert outcome.seconds.keys() == {"scan", "relabel", "train"}


@pytest.mark.parametrize(("name", "settings"), [("abl", {"fraction": SHARE}), ("dbr", {"epochs": 10, "lr": 3e-3})])
def test_what_is_isolated_is_unlearned(
    name: str, settings: dict[str, Any], known: tuple[Task, Truth], defend: Callable[..., Outcome]
) -> None:
    (task, truth), outcome = known, defend(name, **settings)
    plan, scores = outcome.plan, outcome.scores
    assert plan is not None and scores is not None and plan.suspect.any()
    assert np.array_equal(plan.keep, ~plan.suspect) and scores[plan.suspect].min() >= scores[~plan.suspect].max()
    assert name != "abl" or np.array_equal(plan.suspect, truth.poisoned)
    risen = losses(outcome.model, task) - losses(task.undefended, task)
    assert risen[plan.suspect].mean() > max(0.5, risen[~plan.suspect].mean() + 0.5)
    assert outcome.seconds.keys() == {"scan", "train", "unlearn"} and outcome.seconds["train"] == PLAIN


def test_pdb_trains_stamped_trusted_images_with_the_next_label(
    known: tuple[Task, Truth], defend: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, (task, _) = dict[str, Any](), known

    def spy(session: Any, plan: NABPlan, arm: str, **how: Any) -> nn.Module:
        network = session.build()
        seen.update(session=session, plan=plan, network=network)
        return network

    monkeypatch.setattr(pdb, "train", spy)
    outcome = defend("pdb", size=8, repeats=3)
    plan, source, n = seen["plan"], seen["session"].source, len(task.source) + len(task.clean)
    stamped = np.flatnonzero(plan.stamped)
    assert np.array_equal(stamped, np.arange(n, n + 3 * len(task.clean))) and plan.keep.all()
    assert np.array_equal(plan.new_labels[stamped], np.tile((task.clean.labels + 1) % 10, 3))
    assert np.array_equal(plan.new_labels[:n], np.r_[task.source.labels, task.clean.labels])
    assert np.array_equal(source.pixels(int(stamped[-1])), task.clean.pixels(len(task.clean) - 1))
    assert isinstance(outcome.model, MappedBack) and isinstance(outcome.model.model, DefendedModel)
    assert outcome.model.model.model is seen["network"] and outcome.model.model.stamp == seen["session"].stamp
    assert (seen["session"].stamp.size, seen["session"].stamp.value) == (2, 1.0)  # a quarter of 8 pixels
    assert outcome.plan is None and outcome.scores is None and outcome.seconds.keys() == {"train"}


@pytest.mark.parametrize(
    ("told", "result"),
    [
        ("repaired: second: universal perturbations turned 0.90, then 0.05", {"chosen": "second", "after": 0.05}),
        ("not repaired: second: universal perturbations turned 0.90, then 0.40", {"chosen": "second", "after": 0.4}),
        ("rejected: universal perturbations turned 0.90, then 0.90", {"status": "rejected", "after": 0.9}),
        ("rejected: no more: universal perturbations turned 0.90, then 0.90",
         {"status": "rejected", "after": 0.9, "stopped": "no more"}),
    ],
)  # fmt: skip
def test_a_repair_says_what_came_of_it(
    told: str, result: dict[str, Any], known: tuple[Task, Truth], defend: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    (task, _), given, model = known, list[Any](), nn.Identity()
    judged = {"before": {"proxy": 0.9}, "after": {"proxy": result["after"]}}
    found = PurifyResult(model, **{"status": "accepted", "chosen": None, "candidates": [], **result, **judged})

    def purify(network: nn.Module, clean: Any, method: Any, **how: Any) -> PurifyResult:
        given.extend((network, clean, method))
        return found

    monkeypatch.setattr(repaired, "purify", purify)
    outcome = defend("purify", method="finetune", settings={"steps": 7})
    assert outcome.note == told and outcome.model is model
    assert given[0] is task.undefended and len(given[1]) == len(task.clean) and given[2].steps == 7
    assert outcome.plan is None and outcome.seconds.keys() == {"train", "purify"} and outcome.seconds["train"] == PLAIN
