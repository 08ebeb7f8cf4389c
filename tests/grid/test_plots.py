"""The numbers in the plots of made-up cells."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nab_defense.grid import draw, read_results
from nab_defense.grid.plots import PICTURES, _style
from tests.grid.made_up import rate, write


@pytest.fixture(scope="module")
def axes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Axes]:
    """Of each picture its axes."""
    folder, made = tmp_path_factory.mktemp("cells"), dict[str, Axes]()
    for poison, out, more in ((0.2, "high", 0.0), (0.05, "low", 0.1)):
        for seed, asr in enumerate((0.1, 0.3)):
            write(folder / out, "badnets", "drop", seed, asr + more, gap=0.02 + seed / 100, poison=poison)
        write(folder / out, "badnets", "nab", 0, 0.05 + more, gap=-0.01, poison=poison)
    write(folder, "blend", "nab", 0, 0.6, gap=0.04)
    several = {"defended": {"acc": rate(0.9), "asr": rate(0.5), "worst": rate(0.8)}, "acc_gap": 0.05}
    write(folder, "several", "nab", 0, 0.5, figures=several)  # of several triggers the one that works best
    write(folder, "none", "nab", 0, None, gap=0.5)  # harmless
    write(folder, "sig", "nab", 0, 0.99, gap=0.5, status="attack failed")
    write(folder, "wanet", "drop", 0, 0.99, gap=0.5, status="failed")
    results = read_results(folder)
    for name, make in PICTURES.items():
        figure = Figure()
        make(figure, results, results.records)
        made[name] = figure.axes[0]
    assert len(draw(results, folder)) == len(made)
    return made


def test_a_dot_a_cell_asr_over_gap(axes: dict[str, Axes]) -> None:
    dots = {str(one.get_label()): np.asarray(one.get_offsets()) for one in axes["asr_against_gap"].collections}
    expected = {
        "drop": [(0.02, 0.1), (0.03, 0.3), (0.02, 0.2), (0.03, 0.4)],
        "nab": [(-0.01, 0.05), (-0.01, 0.15), (0.04, 0.6), (0.05, 0.8)],
    }
    assert dots.keys() == expected.keys()
    for name, points in expected.items():
        assert np.array(sorted(map(tuple, dots[name]))) == pytest.approx(np.array(sorted(points))), name
    assert axes["asr_against_gap"].get_xlabel() == "ACC gap to the oracle" and axes["asr_against_gap"].get_ylabel() == "ASR"


def test_a_line_an_attack_mean_asr_over_rate(axes: dict[str, Axes]) -> None:
    expected = {
        "drop": [[(5, 0.3), (20, 0.2)]],
        "nab": [[(5, 0.15), (20, 0.05)], [(20, 0.6)], [(20, 0.8)]],  # badnets, blend, several
    }
    lines = axes["asr_by_rate"].lines
    colors = {str(line.get_label()): line.get_color() for line in lines if line.get_label()}
    assert colors.keys() == expected.keys() and len(set(colors.values())) == 2  # a name once, a color each
    for name, attacks in expected.items():
        own = sorted(np.asarray(line.get_xydata()).tolist() for line in lines if line.get_color() == colors[name])
        assert [np.ravel(line) for line in own] == [pytest.approx(np.ravel(line)) for line in sorted(attacks)], name
    assert "%" in axes["asr_by_rate"].get_xlabel() and "ASR" in axes["asr_by_rate"].get_ylabel()


def test_heat_is_mean_asr_by_attack_and_defence(axes: dict[str, Axes]) -> None:
    heat = axes["heat"]
    columns = [label.get_text() for label in heat.get_xticklabels()]
    attacks = [label.get_text() for label in heat.get_yticklabels()]
    values = np.ma.filled(np.ma.asarray(heat.images[0].get_array()).astype(float), np.nan)
    expected = {
        ("badnets 20 %", "drop"): 0.2, ("badnets 5 %", "drop"): 0.3, ("badnets 20 %", "nab"): 0.05, ("badnets 5 %", "nab"): 0.15,
        ("blend 20 %", "nab"): 0.6, ("several 20 %", "nab"): 0.8,
    }  # fmt: skip
    found = {(attacks[row], columns[column]): value for (row, column), value in np.ndenumerate(values) if np.isfinite(value)}
    assert found == {place: pytest.approx(value) for place, value in expected.items()}
    assert sorted(text.get_text() for text in heat.texts) == sorted(f"{value:.2f}" for value in expected.values())


def test_forty_defences_look_unlike() -> None:
    looks = {(style["color"], style["marker"]) for style in map(_style, range(40))}
    assert len(looks) == 40 and len({_style(number)["color"] for number in range(20)}) == 20
