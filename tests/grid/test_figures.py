"""The figures of a cell, each worked out by hand."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nab_defense.bench.evaluate import Cases, answers, evaluate, to_dict
from nab_defense.bench.truth import Truth
from nab_defense.defences import Outcome
from nab_defense.defended import DefendedModel
from nab_defense.grid import figures as judged
from nab_defense.runtime import Runtime
from nab_defense.stamp import Stamp
from nab_defense.types import NABPlan

CPU = Runtime(device="cpu", precision="float32")
LABEL, WITH_STAMP, TRIGGER = (
    (0, 0),
    (0, 1),
    (0, 2),
)  # pixels of a test image: tenths of its class, with the stamp, with the trigger
STAMP = Stamp(size=2, corner="bottom_right", value=1.0)


class Reads(nn.Module):
    """Names the class that a pixel says: one pixel, or another one where the image is stamped.

    Args: obeys: Names class 0 where there is a trigger and no stamp."""

    def __init__(self, *, obeys: bool) -> None:
        super().__init__()
        self.obeys = obeys

    def forward(self, images: Tensor) -> Tensor:
        plain, stamped, trigger = ((10 * images[:, 0, row, column]).round() for row, column in (LABEL, WITH_STAMP, TRIGGER))
        has_stamp = images[:, 0, -1, -1] == 1
        said = torch.where(has_stamp, stamped, plain)
        said = torch.where(~has_stamp & (trigger > 0) & self.obeys, 0, said)
        return nn.functional.one_hot(said.long(), 10).float()


def images(plain: list[int], stamped: list[int], trigger: bool) -> list[tuple[Tensor, Tensor]]:
    """One batch."""
    made = torch.zeros(len(plain), 1, 8, 8)
    made[:, 0, *LABEL], made[:, 0, *WITH_STAMP], made[:, 0, *TRIGGER] = (
        torch.tensor(plain) / 10,
        torch.tensor(stamped) / 10,
        trigger,
    )
    return [(made, torch.zeros(len(plain)))]


# Of 20 clean images all are named right as they are, and 14 with the stamp. Of 10 triggered ones, which show class 3, all are
# obeyed as they are; with the stamp 2 are named 0, 3 are named 5 and 5 are named right.
CASES = Cases(
    clean=images([4] * 20, [4] * 14 + [5] * 6, False),
    clean_labels=np.full(20, 4),
    triggered=images([3] * 10, [0] * 2 + [5] * 3 + [3] * 5, True),
    wanted_labels=np.zeros(10, np.int64),
    true_labels=np.full(10, 3),
)
N, POISON = 1000, 20
POISONED = np.arange(N) < POISON
# Of 980 clean samples the scores are 0 to 979: 1 % of them lie above 970, a tenth above 881.
SCORES = np.r_[[2000.0] * 5, [975.5] * 7, [900.5] * 4, [-1.0] * 4, np.arange(980.0)].astype(np.float32)
TRUE = np.where(POISONED, 3, 4)
GIVEN = np.where(POISONED, 0, 4)


def outcome(model: nn.Module) -> Outcome:
    """Of 16 suspects 12 are poison; 10 suspects are relabelled, and of the 9 that are kept 6 rightly; 3 are dropped, 30 cover."""
    plan = NABPlan.empty(GIVEN)
    suspect, cover = np.zeros(N, bool), np.zeros(N, bool)
    suspect[[*range(12), *range(100, 104)]] = True
    cover[200:230] = True
    labels, keep = plan.labels.copy(), plan.keep.copy()
    labels[:6], labels[6:10] = 3, 7
    keep[[9, 10, 100]] = False  # one that is relabelled, too
    return Outcome(model, {}, NABPlan(plan.labels, labels, suspect, keep, cover), SCORES)


def case(**changes: Any) -> Any:
    """A case whose undefended network obeys, and whose oracle is right."""
    cases = dataclasses.replace(CASES, **changes)
    obeys, oracle = Reads(obeys=True), Reads(obeys=False)
    measured = lambda model, given=None: to_dict(evaluate(model, cases, CPU, given=given))  # noqa: E731
    return SimpleNamespace(
        cases=cases,
        session=SimpleNamespace(runtime=CPU),
        measured=measured,
        answers=lambda model: answers(model, cases, CPU),
        oracle_answers=answers(oracle, cases, CPU),
        twins=SimpleNamespace(figures={"undefended": measured(obeys), "oracle": measured(oracle)}),
        truth=Truth(POISONED, TRUE, 0, "all_to_one", np.zeros(N, bool)),
    )


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"defended.asr": (value, n), ...}: of rates these two, of all else what is there."""
    if isinstance(value, dict) and "value" in value:
        assert value["low"] <= value["value"] <= value["high"] and value["low"] < value["high"], name
        return {name: (value["value"], value["n"])}
    if isinstance(value, dict):
        return {key: part for inner in value for key, part in flat(value[inner], f"{name}.{inner}".lstrip(".")).items()}
    return {name: value}


AREA = (5 * 980 + 7 * 976 + 4 * 901) / (20 * 980)  # how many of the clean samples each of the poisoned ones outranks
STAMPED = {"defended.acc": (14 / 20, 20), "defended.asr": (2 / 10, 10), "defended.ra": (5 / 10, 10)}
WHOLE = {"acc": (1, 20), "asr": (1, 10), "ra": (0, 10)}
BESIDE = {"excess_asr": (2 / 10, 10), "acc_gap": (6 / 20, 20), "der": ((0.8 - 0.3 + 1) / 2, 10), "der_ceiling": 1}
DETECTION = {
    "detection.selected": 16, "detection.precision": (12 / 16, 16), "detection.recall": (12 / 20, 20),
    "detection.auroc": (AREA, 20), "detection.tpr_at_1pct": (12 / 20, 20), "detection.tpr_at_01pct": (5 / 20, 20),
}  # fmt: skip
REJECTS = {"rejects.clean": (6 / 20, 20), "rejects.triggered": (8 / 10, 10)}  # obeyed without the stamp, and 2 with it


def defended() -> DefendedModel:
    return DefendedModel(Reads(obeys=True), STAMP, mean=[0.0], std=[1.0])


def test_every_figure_of_a_stamped_network() -> None:
    plain = {f"plain.{name}": rate for name, rate in WHOLE.items()}
    # changed: 9 relabelled and kept, 3 dropped, 30 covers
    told = {"altered": (42 / N, N), "relabel_accuracy": (6 / 9, 9), "poisoned": POISON}
    expected = STAMPED | plain | BESIDE | DETECTION | REJECTS | told
    assert flat(judged.figures(outcome(defended()), case())) == {name: pytest.approx(rate) for name, rate in expected.items()}


def test_a_network_without_a_stamp_rejects_nothing() -> None:
    found = judged.figures(outcome(Reads(obeys=True)), case())
    expected = {f"defended.{name}": rate for name, rate in WHOLE.items()} | {"excess_asr": (1, 10), "der": (0.5, 10)}
    assert found["plain"] is found["rejects"] is None
    assert {name: flat(found)[name] for name in expected} == {name: pytest.approx(rate) for name, rate in expected.items()}


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"plan": None}, {"altered", "detection", "relabel_accuracy"}),  # it does not go sample by sample
        ({"plan": None, "scores": None}, {"altered", "detection", "relabel_accuracy"}),
        ({"scores": None}, {"detection"}),  # it ranks nothing
    ],
)
def test_what_a_defence_does_not_say_is_null(changes: dict[str, Any], missing: set[str]) -> None:
    found = judged.figures(dataclasses.replace(outcome(defended()), **changes), case())
    assert {name for name, figure in found.items() if figure is None} == missing


def test_the_oracle_detects_nothing() -> None:
    found = judged.figures(outcome(defended()), case(), detects=False)
    assert {name for name, figure in found.items() if figure is None} == {"detection", "relabel_accuracy"}


def test_harmless_data_has_no_figure_of_an_attack() -> None:
    found = judged.figures(outcome(defended()), case(triggered=None, wanted_labels=None, true_labels=None))
    assert {name for name, figure in found.items() if figure is None} == {"excess_asr", "der", "der_ceiling"}
    assert found["rejects"]["triggered"] is None and found["rejects"]["clean"]["value"] == pytest.approx(6 / 20)


def test_several_triggers_are_an_attack_where_each_is_obeyed() -> None:
    rates = {"acc": {"value": 0.9}, "asr": {"value": 0.8}, "worst": {"value": 1.0}}
    assert judged.attack_works({"undefended": rates, "oracle": rates})
    assert judged.attack_works({"undefended": {**rates, "least": {"value": 0.7}}, "oracle": rates})
    assert not judged.attack_works({"undefended": {**rates, "least": {"value": 0.6}}, "oracle": rates})
    assert judged.attack_works({"undefended": {"acc": {"value": 0.9}}, "oracle": rates}) is None


def test_gap_and_excess_say_who_is_the_better_one() -> None:
    first, rest = np.arange(40) < 4, np.ones(40, bool)
    own, oracle = {"acc": ~first, "asr": first}, {"acc": rest, "asr": ~rest}
    found = judged._beside(own, oracle, None)
    assert (found["acc_gap"]["value"], found["excess_asr"]["value"]) == pytest.approx((0.1, 0.1))  # it lacks both
    assert judged._beside(oracle, own, None)["acc_gap"]["value"] == pytest.approx(-0.1)
    two = judged._beside(own, oracle, (np.arange(40) >= 8).astype(np.int64))  # the first trigger has eight images
    assert two["excess_asr"]["value"] == pytest.approx(0.5) and two["excess_asr"]["n"] == 8


def test_of_several_triggers_der_is_that_of_the_one_that_works_best() -> None:
    rate = lambda value: {"value": value, "n": 10, "low": value, "high": value}  # noqa: E731
    before = {"acc": rate(0.9), "asr": rate(0.6), "worst": rate(1.0)}
    after = {"acc": rate(0.9), "asr": rate(0.1), "worst": rate(0.2)}
    found = judged.effectiveness(after, before)
    assert found["der"]["value"] == pytest.approx(0.9) and found["der_ceiling"] == 1.0


def test_the_ends_of_der_are_those_of_both_falls() -> None:
    before = {"acc": {"value": 0.9, "n": 100, "low": 0.8, "high": 0.95}, "asr": {"value": 1.0, "n": 90, "low": 0.96, "high": 1.0}}
    after = {"acc": {"value": 0.7, "n": 100, "low": 0.6, "high": 0.78}, "asr": {"value": 0.1, "n": 90, "low": 0.05, "high": 0.18}}
    der = judged.effectiveness(after, before)["der"]
    falls = {name: judged._minus(before[name], after[name]) for name in ("asr", "acc")}
    assert der["value"] == pytest.approx((0.9 - 0.2 + 1) / 2) and der["n"] == 90
    assert der["low"] == pytest.approx((falls["asr"]["low"] - falls["acc"]["high"] + 1) / 2)
    assert der["high"] == pytest.approx((falls["asr"]["high"] - falls["acc"]["low"] + 1) / 2)
