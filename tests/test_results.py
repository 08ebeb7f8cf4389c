"""The tables of repairs that people read are those of the files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest

from nab_defense.purify.base import hardly_turned
from tests.digits_runs import ROOT

BENCHMARK, README = ROOT / "docs" / "benchmark.md", ROOT / "README.md"
METHODS = ("ibau", "distill", "polarizer", "rnp")
MODELS = ("badnets_8", "l2_inv_0", "trojan_wm_2")


def read_cells(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((ROOT / "results" / "bench").glob(pattern))]


def purified(method: str, model: str, seed: int) -> dict[str, float]:
    record = json.loads((ROOT / "results" / f"purify_{method}_{model}_seed{seed}.json").read_text())["models"]["purified"]
    return {name: record[name]["value"] for name in ("acc", "asr", "retuned")}


def rows(path: Path, start: str) -> Iterator[list[str]]:
    for line in path.read_text().splitlines():
        if line.startswith(f"| {start} |"):
            yield [cell.strip() for cell in line.strip("| \n").split("|")]


def shown(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"[01]?\.\d{3}", cell)]


@pytest.mark.parametrize("model", MODELS)
def test_every_seed_of_the_repairs_is_told_as_measured(model: str) -> None:
    found = list(rows(ROOT / "results" / "README.md", model))
    assert [int(row[1]) for row in found] == [0, 1, 2]
    for seed, row in enumerate(found):
        for method, cell in zip(METHODS, row[2:], strict=True):
            expected: Any = pytest.approx(list(purified(method, model, seed).values()), abs=6e-4)
            assert shown(cell) == expected, (method, seed)


@pytest.mark.parametrize("model", MODELS)
def test_the_first_table_of_repairs_is_the_worst_of_the_seeds(model: str) -> None:
    (row,) = rows(ROOT / "README.md", model)
    for method, cell in zip(METHODS, row[3:], strict=True):
        every = [purified(method, model, seed) for seed in range(3)]
        worst = min(one["acc"] for one in every), max(one["asr"] for one in every)
        assert shown(cell) == pytest.approx(worst, abs=6e-4), method


def test_what_is_called_repaired_left_little() -> None:
    records = [json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("purify_*.json"))]
    left = dict[bool, list[float]]({True: [], False: []})
    for record in records:
        if "purified" in record["models"]:
            left[hardly_turned(record["before"], record["after"])].append(record["models"]["purified"]["asr"]["value"])
    told = re.search(r"Of the (\d+) repairs whose\s+files are here, the (\d+) with", (ROOT / "results" / "README.md").read_text())
    assert told is not None and [len(left[True]) + len(left[False]), len(left[True])] == [int(count) for count in told.groups()]
    assert max(left[True]) < 0.08 and max(left[False]) > 0.19  # so it is worth asking


def obeyed(measured: dict[str, Any]) -> float:
    """ASR; of several triggers that of the one which works best."""
    return float(measured.get("worst", measured["asr"])["value"])


DIGITS = {
    "badnets": "badnets", "blend": "blend", "lf": "lf", "wanet": "wanet", "adap_blend": "adap_blend", "adap_patch": "adap_patch",
    "stamp_aware": "stamp_aware", "ssba": "ssba", "badnets and blend at once": "several", "tact (5 %)": "tact",
    "blend, all to all": "blend_all", "badnets, all to all": "badnets_all",
}  # fmt: skip
CIFAR = {
    "badnets": "badnets", "blend": "blend", "lf": "lf", "sig (9 %)": "sig", "label_consistent (9 %)": "label_consistent",
    "input_aware": "input_aware", "ssba": "ssba", "stamp_aware": "stamp_aware", "adap_blend": "adap_blend",
}  # fmt: skip
TARGETS = {
    "badnets, 3": "badnets", "blend, 6": "blend", "wanet, 7": "wanet", "lf, 5": "lf", "ssba, 3": "ssba",
    "adap_blend, 9": "adap_blend", "adap_patch, 5": "adap_patch", "tact (5 %), 7 to 4": "tact", "stamp_aware, 8": "stamp_aware",
    "badnets and blend at once, 2 and 3": "several", "label_consistent (5 %), 9": "label_consistent",
}  # fmt: skip
TACT = {f"{source} to {target}": f"tact_{source}_to_{target}" for source, target in ("74", "81", "06", "49", "30", "18")}
MORE = {"bpp": "bpp", "narcissus (9 %)": "narcissus", "adap_patch": "adap_patch", "badnets and blend at once": "several"}
MORE["blur (filter)"] = "blur"
FILTERS = {name: name for name in ("blur", "solarize", "pixelate", "jpeg", "contrast", "warm", "rotate")}


@pytest.mark.parametrize(
    ("title", "folder", "attacks", "seeds"),
    [
        ("scikit-learn's digits with `recipes/bench/digits.yaml`", "digits_shuffled", DIGITS, 3),
        ("12,000 CIFAR-10 images with `recipes/bench/cpu.yaml`", "cpu_shuffled", CIFAR, 3),
        ("Attacks that it leaves out, `recipes/bench/cpu_more.yaml`", "cpu_more", MORE, 1),
        ("(`recipes/bench/digits_targets.yaml`)", "digits_targets", TARGETS, 3),
        ("since b3878d6. By that, the grid as far as it ran:", "digits_filters", FILTERS, 3),
        ("and with seeds that nothing was set on ([cells]", "digits_filters_52_53", FILTERS, 3),
        ("(`recipes/bench/digits_tact.yaml`)", "digits_tact_40_to_42", TACT, 3),
    ],
)
def test_a_table_of_the_benchmark_is_that_of_its_cells(title: str, folder: str, attacks: dict[str, str], seeds: int) -> None:
    paths = (ROOT / "results" / "bench" / folder).glob("*-nab-*.json")
    read = [cell for cell in map(json.loads, map(Path.read_text, paths)) if cell["cell"]["rate"] != 0.01]
    cells = {(cell["cell"]["attack"], cell["cell"]["seed"]): cell for cell in read}
    assert len(cells) == len(read)
    table = BENCHMARK.read_text().split(title)[1].split("\n\n")[1]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    harmless = [row for row in found if row[0].startswith("none")]
    assert len(found) - len(harmless) == len(attacks)
    for name, undefended, oracle, asr, gap, detected in found[: len(attacks)]:
        attack = attacks[re.sub(r" \(not learned.*|; seeds [\d, ]*", "", name)]
        runs = [cells[place] for place in sorted(cells) if place[0] == attack]
        assert len(runs) == seeds or f"; seeds {', '.join(str(seed) for one, seed in sorted(cells) if one == attack)}" in name
        done = [run for run in runs if run["status"] == "done"]
        assert [cell.strip() == "-" for cell in asr.split(",")] == [run not in done for run in runs], name
        twins = [[obeyed(run["twins"][twin]) for run in done] for twin in ("undefended", "oracle")]
        figures = [run["figures"] for run in done]
        precise, whole = ([one["detection"][kind] for one in figures] for kind in ("precision", "recall"))
        expected = [
            [min(twins[0])], [max(twins[1])], [obeyed(one["defended"]) for one in figures],
            [one["acc_gap"]["value"] for one in figures],
            [min(kind["value"] for kind in kinds if kind) for kinds in (precise, whole)],
        ]  # fmt: skip
        for cell, values in zip((undefended, oracle, asr, gap, detected), expected, strict=True):
            numbers = [float(number) for number in re.findall(r"-?[01]?\.\d\d", cell)]
            assert numbers == pytest.approx(values, abs=0.0051), (name, cell)
    clean = [cells[place]["figures"] for place in sorted(cells) if place[0] == "none"]
    assert len(harmless) == bool(clean)
    for *_, asr, gap, _ in harmless:
        assert (asr == "nothing changed") == (not any(one["altered"]["value"] for one in clean))
        assert [float(number) for number in gap.split(",")] == pytest.approx(
            [one["acc_gap"]["value"] for one in clean], abs=0.0051
        )


def test_runs_with_few_classes_are_told_as_measured() -> None:
    text = (ROOT / "results" / "README.md").read_text().split("## Fewer than ten classes")[1].split("\n## ")[0]
    found = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if re.match(r"\| (two|three|five) ", line)
    ]
    paths = {path.stem for path in (ROOT / "results").glob("few_*.json")}
    for classes, attack, seed, undefended, oracle, defended, suspects in found:
        name = attack.replace(" to 0", "_target0").replace(" to 1", "_target1").replace(" ", "_")
        paths.remove(f"few_{classes}_{name}_seed{seed}")
        record = json.loads((ROOT / "results" / f"few_{classes}_{name}_seed{seed}.json").read_text())
        models, detection = record["models"], record["detection"]
        arms = ("undefended", ("acc", "asr")), ("oracle", ("asr",)), ("defended", ("acc", "asr"))
        for cell, (arm, kinds) in zip((undefended, oracle, defended), arms, strict=True):
            expected = [models[arm][kind]["value"] for kind in kinds if kind in models.get(arm, {})]
            assert shown(cell) == pytest.approx(expected, abs=6e-4), (classes, attack, arm)
        told = [detection[kind] for kind in ("precision", "recall") if detection.get(kind) is not None]
        assert shown(suspects) == pytest.approx(told, abs=6e-4), (classes, attack)
        assert (suspects == "nobody accused") == (detection["selected"] == 0 and attack == "none")
    assert not paths


def test_all_defences_on_digits_are_told_as_measured() -> None:
    """The highest ASR of the seeds with which the attack is learned, and the mean ACC gap."""
    ran: dict[tuple[str, str, bool], list[dict[str, Any]]] = {}
    for one in read_cells("digits_all/*.json"):
        if one["status"] == "done" and one["cell"]["attack"] != "none":
            ran.setdefault((one["cell"]["defence"], one["cell"]["attack"], one["cell"]["rate"] == 0.01), []).append(one)
    table = BENCHMARK.read_text().split("**All defences of")[1].split("\n\n")[1]
    head, _, seeds, *found = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    names = {"both": "several", "badnets, all": "badnets_all", "blend, all": "blend_all"}
    asked = [(names.get(name.removesuffix(" 1 %"), name.removesuffix(" 1 %")), name.endswith(" 1 %")) for name in head[1:-1]]
    assert {where[1:] for where in ran} == set(asked) and len(found) == len({defence for defence, *_ in ran}) - 2
    assert seeds[1:-1] == [", ".join(sorted(str(one["cell"]["seed"]) for one in ran["none", *where])) for where in asked]
    for defence, *told in found:
        figures = [[one["figures"] for one in ran.get((defence, *where), [])] for where in asked]
        expected = [max((obeyed(one["defended"]) for one in some), default=None) for some in figures]
        gaps = [one["acc_gap"]["value"] for some in figures for one in some]
        assert [float(number) if number else None for number in told] == pytest.approx([*expected, mean(gaps)], abs=0.0051), (
            defence
        )


def test_a_cell_that_was_run_again_from_scratch_gave_the_same_figures() -> None:
    """With twins of its own, by a later state of the code."""
    (path,) = (ROOT / "results" / "bench" / "digits_again").glob("*.json")
    again, first = (json.loads(one.read_text()) for one in (path, ROOT / "results" / "bench" / "digits_all" / path.name))
    assert again["commit"] != first["commit"] and again["status"] == first["status"] == "done"
    for told in ("key", "config", "twins", "figures"):
        assert again[told] == first[told]


@pytest.mark.parametrize(("title", "seeds"), [("Purifiers on the undefended network", (0, 1, 2)), ("Defences of others", (2,))])
def test_other_defences_are_told_as_measured(title: str, seeds: tuple[int, ...]) -> None:
    """The highest ASR, the mean ACC gap, and how many repairs are not called one."""
    read = read_cells("cpu_shuffled/*.json")
    cells = [cell for cell in read if cell["cell"]["rate"] != 0.01 and cell["cell"]["seed"] in seeds and cell["status"] == "done"]
    table = BENCHMARK.read_text().split(title)[1].split("\n\n")[1]
    head, _, *found = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len(found) == len(CIFAR) + 1 and len(head) > 5
    for name, count, *shown_cells in found:
        attack = CIFAR.get(name, name)
        runs = [[one for one in cells if (one["cell"]["attack"], one["cell"]["defence"]) == (attack, row)] for row in head[2:]]
        assert {len(one) for one in runs if one} == {int(count)} - {0}, name
        for row, cell, ran in zip(head[2:], shown_cells, runs, strict=True):
            figures = [one["figures"] for one in ran]
            expected = [max(obeyed(one["defended"]) for one in figures)] if figures and attack != "none" else []
            expected += [mean(one["acc_gap"]["value"] for one in figures)] if figures else []
            bad = sum(one["note"].startswith(("not repaired", "rejected")) for one in ran)
            numbers = [float(number) for number in re.findall(r"-?[01]?\.\d\d", cell)]
            assert numbers == pytest.approx(expected, abs=0.0051), (name, row)
            assert re.findall(r"\((\d)\)", cell) == [str(bad)] * bool(bad), (name, row)


def test_the_readme_shows_the_worst_of_every_defence() -> None:
    read = read_cells("cpu_shuffled/*.json")
    cells = [one for one in read if one["cell"]["rate"] != 0.01 and one["cell"]["attack"] != "none" and one["status"] == "done"]
    table = README.read_text().split("**The highest ASR of three")[1].split("\n\n")[1]
    head, _, *found = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    ran = {row: [one for one in cells if one["cell"]["defence"] == row] for row in head[2:]}
    expected = [
        [
            max((obeyed(one["figures"]["defended"]) for one in ran[row] if one["cell"]["attack"] == attack), default=None)
            for row in head[2:]
        ]
        for attack in CIFAR.values()
    ]
    expected.append([mean(one["figures"]["acc_gap"]["value"] for one in ran[row]) for row in head[2:]])
    times = [[one["relative_seconds"]["total"] for one in ran[row]] for row in head[2:]]
    assert len(head) == 11 and [row[0] for row in found[: len(CIFAR)]] == [*CIFAR]
    for row, values in zip(found, expected, strict=False):
        assert [float(cell) if cell else None for cell in row[2:]] == pytest.approx(values, abs=0.0051), row[0]
    for attack, row in zip(CIFAR.values(), found, strict=False):
        least = min(obeyed(one["twins"]["undefended"]) for one in ran["nab"] if one["cell"]["attack"] == attack)
        assert float(row[1]) == pytest.approx(least, abs=0.0051)
    for cell, taken in zip(found[-1][2:], times, strict=True):
        assert shown_numbers(cell) == pytest.approx([median(taken), max(taken)], abs=0.051)


def shown_numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d)?", cell)]


def test_what_perturbations_turn_of_harmless_networks_is_told_as_measured() -> None:
    notes = [
        str(cell.get("note"))
        for cell in read_cells("*/*-none-0pct-*.json")
        if cell["cell"]["defence"] in (*METHODS, "clp", "finetune")
    ]
    turned = [float(found[1]) for note in notes if (found := re.search(r"perturbations turned (\d\.\d\d),", note))]
    told = re.search(r"and (\.\d\d) to (\.\d\d) of harmless ones", " ".join(README.read_text().split()))
    assert told is not None and [float(one) for one in told.groups()] == [min(turned), max(turned)] and len(turned) > 20


def test_every_run_of_badnets_on_digits_is_in_the_limits() -> None:
    runs = [
        cell["figures"]
        for cell in read_cells("digits*/*-badnets-10pct-nab-*.json")
        if cell["status"] == "done" and cell["cell"]["attack"] == "badnets"
    ]
    found = [one["detection"] for one in runs]  # of old states without intervals
    shares = [
        [value["value"] if isinstance(value := one[name], dict) else value for one in found] for name in ("recall", "precision")
    ]
    wanted = [len(runs), *(round(value, 2) for share in shares for value in (min(share), max(share)))]
    told = re.search(
        r"in the (\d+) runs of BadNets on digits that are kept, of all states of the code, the recall was (\S+) to (\S+), "
        r"the precision (\S+) to (\S+), the ASR (\S+) at most",
        " ".join(README.read_text().split()),
    )
    assert told is not None and [float(one.strip(",")) for one in told.groups()] == [
        *wanted,
        round(max(one["defended"]["asr"]["value"] for one in runs), 2),
    ]
