"""What is told of attacks with few poisoned images, 1 % of a set, is that of the cells."""

from __future__ import annotations

import re

import pytest

from tests.test_results import BENCHMARK, obeyed, read_cells


def test_what_is_left_of_thirteen_images_is_told_as_measured() -> None:
    table = BENCHMARK.read_text().split("**13 poisoned images of 1,300.**")[1].split("\n\n")[1]
    shown_rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:-1]]
    ran = {(one["cell"]["attack"], one["cell"]["seed"]): one for one in read_cells("digits_1pct_49_to_51/*-nab-*.json")}
    learned = {where for where, one in ran.items() if one["status"] == "done" and where[0] != "none"}
    assert learned == {(row[0].split()[0], int(seed)) for row in shown_rows for seed in row[1].split(", ")}
    for name, seeds, undefended, oracle, asr, gaps, found in shown_rows:
        runs = [ran[name.split()[0], int(seed)] for seed in seeds.split(", ")]
        twins, figures = [one["twins"] for one in runs], [one["figures"] for one in runs]
        told = [undefended, oracle, *asr.split(", "), *gaps.split(", ")]
        wanted = [min(obeyed(one["undefended"]) for one in twins), max(obeyed(one["oracle"]) for one in twins)]
        wanted += [obeyed(one["defended"]) for one in figures] + [one["acc_gap"]["value"] for one in figures]
        assert [float(number) for number in told] == pytest.approx(wanted, abs=0.0051), name
        shares = [one["detection"] for one in figures]
        assert found.split(", ") == [
            " / ".join(f"{one[kind]['value']:.2f}".lstrip("0") for kind in ("precision", "recall")) if one["precision"] else "-"
            for one in shares
        ]
    harmless = [one["figures"] for (attack, _), one in ran.items() if attack == "none"]
    assert [one["acc_gap"]["value"] for one in harmless] == [0, 0, 0] == [one["altered"]["value"] for one in harmless]


def test_ssba_with_one_image_in_a_hundred_is_told_as_measured() -> None:
    """ASR / ACC gap of each defence and seed, or nothing where it was not run; and of the twins on whose machine that was."""
    table = BENCHMARK.read_text().split("**SSBA at 1 %, all defences.**")[1].split("\n\n")[1]
    read = [one for one in read_cells("cpu_shuffled/*-ssba-1pct-*.json") if one["cell"]["defence"] not in ("none", "oracle")]
    cells = {(one["cell"]["defence"], one["cell"]["seed"]): one for one in read}
    (_, *seeds), _, *found = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    for name, *told in found:
        for seed, cell in zip([int(seed.removeprefix("seed ")) for seed in seeds], told, strict=True):
            if name in ("undefended", "oracle"):
                twins = {obeyed(one["twins"][name]) for (_, own), one in cells.items() if own == seed}
                assert [float(cell)] == pytest.approx([*twins], abs=0.0051), (name, seed)
                continue
            one = cells.pop((name, seed), None)
            figures = [] if one is None else [obeyed(one["figures"]["defended"]), one["figures"]["acc_gap"]["value"]]
            assert [float(number) for number in re.findall(r"-?[01]?\.\d\d", cell)] == pytest.approx(figures, abs=0.0051), name
            noted = "" if one is None else one["note"]
            assert ("not repaired" in cell, "rejected" in cell) == (
                noted.startswith("not repaired"),
                noted.startswith("rejected"),
            )
    assert not cells
