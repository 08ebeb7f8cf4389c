"""Finished cells as pictures: ASR against the ACC gap, ASR by rate, and a heat map of attacks and defences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from .run import DONE
from .tables import ASR, GAP, Record, Results, measured

__all__ = ["draw"]

MARKERS = "osD^vP*X"
SHADES: Any = colormaps["tab20"]  # dark and light by turns


def draw(results: Results, folder: Path) -> list[Path]:
    """Write the pictures of each network; those without any attack that works are left out.

    Returns: their paths."""
    drawn = []
    for network in results.networks:
        cells = results.at(network=network)
        if not measured([cell for cell in cells if cell["cell"]["rate"]], ASR):
            continue
        for name, make in PICTURES.items():
            figure = Figure(figsize=(9, 6), layout="constrained")
            make(figure, results, cells)
            path = folder / f"{name}_{network}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=120)
            drawn.append(path)
    return drawn


def _style(number: int) -> dict[str, Any]:
    """Color and marker of a defence, unlike those of forty others: the ten dark colors come first."""
    return {"color": SHADES(2 * number % 20 + number // 10 % 2), "marker": MARKERS[number % len(MARKERS)]}


def _means(cells: list[Record], key: str, value: Any) -> tuple[list[float], list[float]]:
    chosen = [cell for cell in cells if cell["cell"][key] == value and cell["cell"]["rate"]]
    return measured(chosen, ASR), measured(chosen, GAP)


def _against(figure: Figure, results: Results, cells: list[Record]) -> None:
    """A dot a cell: the best corner is the lower left one."""
    axes = figure.subplots()
    for number, defence in enumerate(results.defences):
        rates, gaps = _means(cells, "defence", defence)
        if rates:
            axes.scatter(gaps, rates, label=defence, alpha=0.7, **_style(number))
    axes.set(xlabel="ACC gap to the oracle", ylabel="ASR", title="every cell whose attack works")
    axes.legend(fontsize="small")


def _by_rate(figure: Figure, results: Results, cells: list[Record]) -> None:
    """A line an attack in the color of the defence: a mean over attacks would be one over other attacks at each rate."""
    axes = figure.subplots()
    for number, defence in enumerate(results.defences):
        titles = [defence]
        for attack in results.attacks:
            if points := _rates([cell for cell in cells if cell["cell"]["attack"] == attack], results, defence):
                (line,) = axes.plot(*zip(*points, strict=True), alpha=0.6, **_style(number))
                line.set(label=titles.pop() if titles else None)
    axes.set(xlabel="poison rate, %", ylabel="ASR of each attack that works", xscale="log")
    axes.legend(fontsize="small")


def _rates(cells: list[Record], results: Results, defence: str) -> list[tuple[float, float]]:
    """(poison rate in %, mean ASR) where there is any, ascending."""
    points = []
    for rate in sorted(rate for rate in results.rates if rate):
        values, _ = _means([cell for cell in cells if cell["cell"]["rate"] == rate], "defence", defence)
        if values:
            points.append((100 * rate, mean(values)))
    return points


def _heat(figure: Figure, results: Results, cells: list[Record]) -> None:
    """Mean ASR by attack with its rate, and defence; grey where there is nothing."""
    there = {(cell["cell"]["attack"], cell["cell"]["rate"]) for cell in cells if cell["status"] == DONE}
    attacks = [(name, rate) for name in results.attacks for rate in results.rates if rate and (name, rate) in there]
    values = np.full((len(attacks), len(results.defences)), np.nan)
    for row, (attack, rate) in enumerate(attacks):
        for column, defence in enumerate(results.defences):
            own = [cell for cell in cells if cell["cell"]["attack"] == attack and cell["cell"]["rate"] == rate]
            found, _ = _means(own, "defence", defence)
            if found:
                values[row, column] = mean(found)
    axes = figure.subplots()
    axes.set_facecolor("lightgrey")
    image = axes.imshow(values, vmin=0, vmax=1, cmap="magma_r", aspect="auto")
    axes.set_xticks(range(len(results.defences)), results.defences, rotation=60, ha="right")
    axes.set_yticks(range(len(attacks)), [f"{name} {100 * rate:g} %" for name, rate in attacks])
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.5 else "black", fontsize=8
            )
    figure.colorbar(image, label="mean ASR over seeds whose attack works")


PICTURES: dict[str, Callable[[Figure, Results, list[Record]], None]] = {
    "asr_against_gap": _against,
    "asr_by_rate": _by_rate,
    "heat": _heat,
}
