"""The verdict on a model that was repaired after its check."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from nab_defense.check import Survival, judge, judge_again
from nab_defense.types import NABPlan
from tests.test_check import CLASSES, CLEAN, N, dirty_plan, make

DIED = Survival(20, 0.9, 0.02, 0, None, learned=0.8)
LIVED = Survival(20, 0.9, 0.4, 5, 0.3, learned=0.9)


def again(plan: NABPlan, before: Survival, after: Survival, *, believed: bool = True, **given: Any) -> tuple[Any, Any]:
    first = judge(plan, before, CLASSES, **given)
    return first, judge_again(first, plan, after, repair="Repaired by x.", believed=believed)


def test_after_a_repair_all_three_are_said() -> None:
    first, verdict = again(dirty_plan(), LIVED, DIED)
    assert not first.protected and verdict.protected and verdict.found
    assert verdict.text == (
        "Protected against what was found, after a repair: as shipped, 2.0 % of the relabelled still go to their old label. "
        f"Repaired by x. Before the repair: {first.text}"
    )
    assert verdict.evidence == {**first.evidence, "after_repair": dataclasses.asdict(DIED)}


def test_a_trigger_that_survives_the_repair_is_not_protected() -> None:
    for before in (LIVED, DIED):
        _, verdict = again(dirty_plan(), before, LIVED)
        assert not verdict.protected
        assert verdict.text.startswith("Not protected, the trigger survives, after a repair: as shipped, 40.0 % of")


def test_a_repaired_network_that_learned_nothing_is_not_protected() -> None:
    for plan in (dirty_plan(), make(np.zeros(N, bool))):
        _, verdict = again(plan, DIED, dataclasses.replace(DIED, learned=0.34))
        assert not verdict.protected
        assert verdict.text.startswith("Not protected, the repaired network learned nothing: it names 34 % of unsuspected")


def test_a_repair_where_nothing_could_be_changed() -> None:
    first, verdict = again(make(CLEAN), Survival(0, None, None, 10, 0.9, 0.9), Survival(0, None, None, 10, 0.0, 0.9))
    assert "nothing could be stamped" in first.text and not first.protected and verdict.protected
    assert "what the clean-label suspects share turns 0.0 % of other images" in verdict.text


def test_a_repair_that_is_not_believed_protects_nobody_who_was_not_protected_before() -> None:
    first, verdict = again(dirty_plan(), LIVED, DIED, believed=False)
    assert not first.protected and not verdict.protected
    assert verdict.text.startswith("Not protected, as the repair is not believed: as shipped, 2.0 % of the relabelled")
    first, verdict = again(dirty_plan(), DIED, DIED, believed=False)
    assert first.protected and verdict.protected and verdict.text.startswith("Protected against what was found, after a repair:")
    nothing = Survival(0, None, None, 0, None, 0.9)
    _, verdict = again(make(np.zeros(N, bool)), nothing, nothing, believed=False)
    assert verdict.protected and verdict.text.startswith("Improved: there are no suspects to check the repair on.")
    _, verdict = again(make(np.zeros(N, bool)), nothing, nothing, believed=False, small=3)
    assert not verdict.protected and verdict.text.startswith("Not protected, though improved: there are no suspects")


def test_without_suspects_a_repair_proves_nothing() -> None:
    nothing = Survival(0, None, None, 0, None, 0.9)
    _, verdict = again(make(np.zeros(N, bool)), nothing, nothing)
    assert verdict.protected and verdict.text.startswith("Repaired: there are no suspects to check the repair on. Repaired by x.")
    _, verdict = again(make(np.zeros(N, bool)), nothing, nothing, small=3)
    assert not verdict.protected and verdict.text.startswith("Not protected, though repaired: there are no suspects to check")
