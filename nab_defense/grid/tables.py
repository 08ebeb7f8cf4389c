"""Finished cells as Markdown: what was measured, what failed, and nothing where nothing ran."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..result import short
from .alike import check_one_setting, mixed, read_cells
from .cells import cells_of
from .run import ATTACK_FAILED, DONE, FAILED, Record
from .schema import NONE, ORACLE, Grid

__all__ = ["ASR", "GAP", "Results", "markdown", "measured", "read_results"]

Reader = Callable[[Record], float | None]


def reach(*keys: str | tuple[str, ...], end: str = "value") -> Reader:
    """Record -> the number at this path, of a rate its value, or that end of its interval; None where it is missing or null.

    Args: keys: From outside in; of a tuple the first key that is there."""

    def read(record: Record) -> float | None:
        value: Any = record
        for key in keys:
            tried = (key,) if isinstance(key, str) else key
            value = None if value is None else next((value[one] for one in tried if one in value), None)
        if isinstance(value, dict):
            return float(value[end])
        return value if end == "value" else None

    return read


# Of several triggers at once the ASR of the one that works best: their mean would hide one that is whole.
OBEYED = ("worst", "asr")
ASR_AT, GAP_AT = ("figures", "defended", OBEYED), ("figures", "acc_gap")
ASR, GAP = reach(*ASR_AT), reach(*GAP_AT)


@dataclass(frozen=True, eq=False)
class Results:
    """Finished cells, and the order of their rows and columns.

    Args:
        records: What the cells' files hold.
        networks, attacks, rates, defences: Names as they are to be listed; those without any cell too.
    """

    records: list[Record]
    networks: Sequence[str]
    attacks: Sequence[str]
    rates: Sequence[float]
    defences: Sequence[str]

    def at(self, **place: Any) -> list[Record]:
        """The cells of a place in the grid, e.g. network="resnet", rate=.1."""
        return [record for record in self.records if all(record["cell"][key] == value for key, value in place.items())]

    def kind(self, row: str) -> str:
        """The registered name of the defence in a row, which may be called otherwise."""
        return next((str(record["config"]["defence"]["name"]) for record in self.at(defence=row)), row)


def read_results(folder: Path, grid: Grid | None = None) -> Results:
    """All cells below a folder.

    Args: grid: Gives the order, and the cells that are still empty; cells of other settings are left out. None: those that there
        are, by name.

    Raises:
        ValueError: There is none, or one place has two, of other settings each."""
    records = read_cells(folder)
    if grid is not None:
        keys = {cell.key for cell in cells_of(grid)}
        records = [record for record in records if record["key"] in keys]
    if not records:
        whose = " of this grid" * (grid is not None)
        raise ValueError(f"{folder} holds no finished cell{whose}; run the grid first, or name its --out")
    check_one_setting(folder, records)
    names = {key: list(dict.fromkeys(r["cell"][key] for r in records)) for key in ("network", "attack", "rate", "defence")}
    if grid is not None:
        for key, listed in (("network", grid.networks), ("attack", grid.attacks), ("defence", grid.defences)):
            names[key] = [*listed, *(name for name in names[key] if name not in listed)]
    return Results(records, names["network"], names["attack"], sorted(names["rate"], reverse=True), names["defence"])


def markdown(results: Results) -> str:
    """Everything that the cells show, as one page."""
    told = f"{_counts(results)} {_made(results)}".rstrip()
    parts = ["# Benchmark", told, *mixed(results.records), *_worst(results), "## Attacks", _attacks(results)]
    for network in results.networks:
        for rate in results.rates:
            if results.at(network=network, rate=rate):
                what = f"{100 * rate:g} % poison" if rate else "harmless data"
                parts += [f"## {network}, {what}", _table(results, network, rate)]
    parts += ["## Detection", _details(results, DETECTION), "## Cost and what was changed", _details(results, COST)]
    return "\n\n".join([*parts, LEGEND]) + "\n"


LEGEND = (
    "ASR / ACC gap: share of triggered test images that get the attacker's class, of several triggers at once that of the one "
    "which works best, and the oracle's accuracy less the defence's; mean over seeds ± standard deviation, seeds in brackets; of "
    "one seed its 95 % interval. *attack failed*: the undefended network obeys the trigger, of several the one that works least, "
    "on less than 70 % of the images, and there is nothing to defend (all to all it can do so on hardly more than it names "
    "right: there ACC is the most). *failed*: the defence could not be run. Empty: not run, or not to be told, as the samples "
    "changed by a defence that does not go sample by sample. *Detection* and *Cost*: over the seeds that a defence has."
)


def _counts(results: Results) -> str:
    kinds = {kind: sum(r["status"] == kind for r in results.records) for kind in (DONE, ATTACK_FAILED, FAILED)}
    hours = sum(record["wall_seconds"] for record in results.records) / 3600
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    told = sum("told_by" in record for record in results.records)
    without = f" ({told} told by another cell)" * bool(told)
    return f"{len(results.records)} cells: {counts}{without}; {hours:.1f} h, added up."


def _made(results: Results) -> str:
    """Which code and which processors the cells come from: figures of several do not make one table."""
    lines = []
    for what, key, shown in (("commits", "commit", short), ("processors", "hardware", str)):
        names = [shown(str(record[key])) for record in results.records if key in record]
        counts = {name: names.count(name) for name in dict.fromkeys(names)}
        lines.append(f"{what}: " + "; ".join(f"{name} ({n})" for name, n in counts.items()))
    return "Made by " + ", on ".join(lines) + "." if any("commit" in record for record in results.records) else ""


def _worst(results: Results) -> list[str]:
    """A line a defence: the setting where it does worst on average, and its worst cell."""
    lines = []
    for defence in results.defences:
        if results.kind(defence) in (NONE, ORACLE):
            continue
        places = []
        for network in results.networks:
            for attack in results.attacks:
                for rate in results.rates:
                    cells = measured(results.at(network=network, attack=attack, rate=rate, defence=defence), ASR)
                    if cells:
                        places.append((mean(cells), max(cells), len(cells), f"{attack} at {100 * rate:g} % on {network}"))
        broken = sum(record["status"] == FAILED for record in results.at(defence=defence))
        if places:
            (asr, _, count, where), (_, most, _, cell) = max(places), max(places, key=lambda place: place[1])
            tried = f"{len(places)} settings whose attack works were tried"
            tried += f"; {broken} cells failed" * bool(broken)
            lines.append(f"- {defence}: {where}, ASR {asr:.3f} ({count}); its worst cell is of {cell}, {most:.3f}; {tried}")
        elif broken:
            lines.append(f"- {defence}: nothing is known; {broken} cells failed")
    return ["## Worst attack of each defence", "\n".join(lines), *_common(results)] if lines else []


def _common(results: Results) -> list[str]:
    """A row a defence over those settings and seeds alone that all of them have: other means are of unlike attacks."""
    rows = [name for name in results.defences if results.kind(name) not in (NONE, ORACLE)]
    found = {name: {_place(one): one for one in results.at(defence=name) if measured([one], ASR)} for name in rows}
    by = {name: cells for name, cells in found.items() if cells}
    but = " and ".join(name for name in rows if name not in by)
    shared = set.intersection(*(set(cells) for cells in by.values())) if len(by) > 1 else set()
    if not shared:
        return []
    lines = []
    for name, cells in by.items():
        asr, gap = (measured([cells[place] for place in sorted(shared)], read) for read in (ASR, GAP))
        lines.append([name, _spread(asr), f"{max(asr):.3f}", _spread(gap), f"{max(gap):.3f}"])
    title = f"On the {len(shared)} settings with an attack, seeds counted, that all defences{f' but {but}' * bool(but)} have:"
    return [title, _lines(["defence", "ASR", "highest", "ACC gap", "largest"], lines)]


def _place(record: Record) -> tuple[str, ...]:
    return tuple(str(value) for key, value in record["cell"].items() if key != "defence")


def measured(cells: list[Record], read: Reader) -> list[float]:
    """Numbers of those cells that count: run, and with an attack that works where there is one."""
    return [value for value in map(read, (cell for cell in cells if cell["status"] == DONE)) if value is not None]


def _spread(values: list[float]) -> str:
    middle = f"{mean(values):.3f}"
    return f"{middle} ± {stdev(values):.3f}" if len(values) > 1 else middle


def _known(cells: list[Record], at: tuple[Any, ...]) -> str:
    """A rate over seeds; of one seed with its interval."""
    values, low, high = (measured(cells, reach(*at, end=end)) for end in ("value", "low", "high"))
    interval = f" [{low[0]:.3f}, {high[0]:.3f}]" if len(values) == len(low) == 1 else ""
    return _spread(values) + interval if values else ""


def _cell(cells: list[Record]) -> str:
    """One field: figures of the seeds that count, and what became of the others."""
    count, parts = len(measured(cells, GAP)), []
    if count:
        parts.append(" / ".join(shown for at in (ASR_AT, GAP_AT) if (shown := _known(cells, at))) + f" ({count})")
    for status in (ATTACK_FAILED, FAILED):
        count = sum(cell["status"] == status for cell in cells)
        if count:
            parts.append(f"*{status}* ({count})")
    return "; ".join(parts)


def _table(results: Results, network: str, rate: float) -> str:
    rows = []
    for attack in results.attacks:
        cells = results.at(network=network, rate=rate, attack=attack)
        if cells:
            rows.append([attack, *(_cell([c for c in cells if c["cell"]["defence"] == name]) for name in results.defences)])
    return _lines(["attack", *results.defences], rows)


TWINS = {
    "ACC undefended": reach("twins", "undefended", "acc"),
    "ASR undefended": reach("twins", "undefended", OBEYED),
    "least of several triggers": reach("twins", "undefended", "least"),  # which tells whether the attack failed
    "ACC oracle": reach("twins", "oracle", "acc"),
    "ASR oracle (natural rate)": reach("twins", "oracle", OBEYED),
}


def _attacks(results: Results) -> str:
    """Whether each attack works, and how often a clean network names its target anyway."""
    rows = []
    for network in results.networks:
        for attack in results.attacks:
            for rate in results.rates:
                cells = {c["cell"]["seed"]: c for c in results.at(network=network, attack=attack, rate=rate) if "twins" in c}
                if cells:
                    row = [network, attack, f"{100 * rate:g} %"]
                    for read in TWINS.values():
                        values = [value for value in map(read, cells.values()) if value is not None]
                        row.append(_spread(values) if values else "")
                    rows.append([*row, str(len(cells))])
    return _lines(["network", "attack", "rate", *TWINS, "seeds"], rows)


DETECTION = {
    "precision": reach("figures", "detection", "precision"),
    "recall": reach("figures", "detection", "recall"),
    "AUROC": reach("figures", "detection", "auroc"),
    "TPR at 1 % FPR": reach("figures", "detection", "tpr_at_1pct"),
    "TPR at .1 % FPR": reach("figures", "detection", "tpr_at_01pct"),
    "relabelled right": reach("figures", "relabel_accuracy"),
    "rejects, clean": reach("figures", "rejects", "clean"),
    "rejects, triggered": reach("figures", "rejects", "triggered"),
}
COST = {
    "samples changed": reach("figures", "altered"),
    "DER": reach("figures", "der"),
    "DER at most": reach("figures", "der_ceiling"),
    "excess ASR": reach("figures", "excess_asr"),
    "ASR*": reach("figures", "defended", "retuned"),
    "ASR, worst of several triggers": reach("figures", "defended", "worst"),
    "RA": reach("figures", "defended", "ra"),
    "seconds / plain training": reach("relative_seconds", "total"),
}


def _details(results: Results, columns: dict[str, Reader]) -> str:
    """A row for each network, defence, attack and rate: over the seeds that count, how many these are in brackets."""
    rows = []
    for network, defence, attack in product(results.networks, results.defences, results.attacks):
        for rate in results.rates:
            cells = results.at(network=network, defence=defence, attack=attack, rate=rate)
            values = [measured(cells, read) for read in columns.values()]
            if any(values):
                shown = [f"{_spread(v)} ({len(v)})" if v else "" for v in values]
                rows.append([network, defence, attack, f"{100 * rate:g} %", *shown])
    return _lines(["network", "defence", "attack", "rate", *columns], rows)


def _lines(titles: list[str], rows: list[list[str]]) -> str:
    table = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in table)
