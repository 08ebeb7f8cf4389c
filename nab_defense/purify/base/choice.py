"""Which of a method's candidates is taken."""

from __future__ import annotations

import copy
import logging
from typing import Any

from torch import Tensor, nn

from ...kept import Kept

__all__ = ["LEAST_GAIN", "Choice", "hardly_turned", "may_keep"]

log = logging.getLogger(__name__)
LEAST_GAIN = 0.1  # of the proxy: less is noise, and no repair
TIE = 0.02  # proxies this close are the same
DOUBT = 2.0  # standard errors: a loss that exceeds max_drop by less may be chance
TURNED = 0.5  # of the original's proxy: what leaves so much of it is better than it was, but no repair to lose accuracy for
REPAIRED = 1 / 6  # of it: what leaves so much is not called repaired; results/README.md tells what it hides


class Choice:
    """The candidates so far, and the best of each kind.

    Args:
        before: What the judge says of the original.
        max_drop: See purify.
        kept: What an interrupted run left; `known` are the names of those that it judged."""

    def __init__(self, before: dict[str, Any], max_drop: float, kept: Kept) -> None:
        self.before, self.max_drop, self.kept = before, max_drop, kept
        saved = kept.read("judged") or {"records": [], "seconds": {"method": 0.0, "selection": 0.0}, "best": []}
        self.records: list[dict[str, Any]] = saved["records"]
        self.known = {record["name"] for record in self.records}
        self.seconds: dict[str, float] = saved["seconds"]
        # a network, or what is left of one; of those that are (still turned, above max_drop)
        self.best: dict[tuple[bool, bool], tuple[dict[str, Any], nn.Module | dict[str, Tensor]]]
        self.best = {self._kind(record): (record, weights) for record, weights in saved["best"]}

    def add(self, record: dict[str, Any], network: nn.Module) -> None:
        self.records.append(record)
        log.info("%s: held-out accuracy %.3f, proxy %.3f", record["name"], record["accuracy"], record["proxy"])
        kind = self._kind(record)
        if self._fits(record) and (kind not in self.best or self._better(record, self.best[kind][0])):
            self.best[kind] = record, copy.deepcopy(network)
        self.kept.write("judged", self._state)

    def taken(self, like: nn.Module) -> tuple[dict[str, Any], nn.Module | None]:
        """The best of all with its network; None, and what the original is, where none is better than that.

        Args: like: Takes the weights of one that was judged before a kill."""
        for record, network in (self.best[kind] for kind in sorted(self.best)):
            if record["proxy"] <= self.before["proxy"] - LEAST_GAIN:
                if isinstance(network, dict):
                    like.load_state_dict(network)
                    network = like
                return record, network
        return self.before, None

    def _kind(self, record: dict[str, Any]) -> tuple[bool, bool]:
        still_turned = record["proxy"] >= TURNED * self.before["proxy"]
        return still_turned, self.before["accuracy"] - record["accuracy"] > self.max_drop

    def _fits(self, record: dict[str, Any]) -> bool:
        """What is still turned must keep to max_drop, all others may by as much as the images cannot tell."""
        return self._kind(record) != (True, True) and may_keep(self.before, record, self.max_drop)

    def _better(self, record: dict[str, Any], than: dict[str, Any]) -> bool:
        """A clearly lower proxy, or one as low as the lowest of its kind and more accurate. Proxies are as low as the lowest, not
        as each other: many small steps would lead away from it. One that was passed over is not kept for a lower bound."""
        rivals = [one for one in self.records if self._fits(one) and self._kind(one) == self._kind(record)]
        bound = min(one["proxy"] for one in rivals) + TIE
        more = record["accuracy"], -record["proxy"]
        return bool(record["proxy"] < bound and (than["proxy"] >= bound or more > (than["accuracy"], -than["proxy"])))

    def _state(self) -> dict[str, Any]:
        best = [(record, dict(n if isinstance(n, dict) else n.state_dict())) for record, n in self.best.values()]
        return {"records": self.records, "seconds": self.seconds, "best": best}


def may_keep(before: dict[str, Any], record: dict[str, Any], max_drop: float) -> bool:
    """Whether the loss of accuracy may be at most max_drop, for all that the held-out images can tell."""
    return bool(before["accuracy"] - record["accuracy"] <= max_drop + DOUBT * record["error"])


def hardly_turned(before: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether less than a sixth of what turned the original is left; nobody knows how much of the backdoor that is."""
    return bool(record["proxy"] < REPAIRED * before["proxy"])
