"""Tables and plots of made-up cells: means, marks, gaps that stay empty, and the worst attack."""

from __future__ import annotations

from pathlib import Path

import pytest

from nab_defense import io
from nab_defense.grid import cells_of, draw, load_grid, markdown, read_results
from tests.grid.made_up import rate, rows, write
from tests.grid.small import small_grid

TWINS = ("undefended", "oracle")


def test_means_marks_and_empty_cells(tmp_path: Path) -> None:
    out = tmp_path / "out"
    attacks = {name: None for name in ("none", "badnets", "blend", "wanet", "sig", "bpp")}
    grid = load_grid(small_grid(tmp_path, attacks=attacks, defences={"drop": None, "nab": None}, seeds=[0, 1]))
    keys = {(cell.setting.attack, cell.setting.seed): cell.key for cell in cells_of(grid) if cell.defence == "drop"}
    for seed, asr in enumerate((0.1, 0.3)):
        write(out, "badnets", "drop", seed, asr, gap=0.01, key=keys["badnets", seed])
        write(out, "blend", "drop", seed, 0.05, key=keys["blend", seed])
        write(out, "none", "drop", seed, None, gap=0.02, key=keys["none", seed])
    write(out, "wanet", "drop", 0, 0.99, status="attack failed", key=keys["wanet", 0])
    write(out, "sig", "drop", 0, 0.9, status="failed", error="no", key=keys["sig", 0])
    write(out, "bpp", "drop", 0, 0.9, key="of other settings")
    results = read_results(out, grid)
    page = markdown(results)
    table = {row[0]: row for name in attacks for row in rows(page, name) if len(row) == 3}
    assert table["badnets"] == ["badnets", "0.200 ± 0.141 / 0.010 ± 0.000 (2)", ""]  # nab was not run
    assert table["none"] == ["none", "0.020 ± 0.000 (2)", ""]
    assert table["wanet"][1] == "*attack failed* (1)" and table["sig"][1] == "*failed* (1)"
    assert "bpp" not in table  # nothing of it was run
    assert "- drop: badnets at 20 % on resnet, ASR 0.200 (2); its worst cell is of badnets at 20 % on resnet, 0.300; 2" in page
    assert "8 cells: 6 done, 1 attack failed, 1 failed; 4.0 h, added up." in page
    pictures = draw(results, tmp_path / "summary")
    assert [path.name for path in pictures] == ["asr_against_gap_resnet.png", "asr_by_rate_resnet.png", "heat_resnet.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_defences_are_compared_where_all_of_them_ran(tmp_path: Path) -> None:
    for name, settings in {"drop": ("badnets", "blend"), "nab": ("badnets", "wanet"), "oracle": ("badnets",)}.items():
        for place, attack in enumerate(settings):
            write(tmp_path, attack, name, 0, (0.1, 0.9)[place], gap=0.02)
    write(tmp_path, "sig", "nab", 0, 0.9, status="failed", error="no")
    page = markdown(read_results(tmp_path))
    assert "On the 1 settings with an attack, seeds counted, that all defences have:" in page
    assert ["nab", "0.100", "0.100", "0.020", "0.020"] in rows(page, "nab") and not rows(page, "oracle")
    assert page.count("2 settings whose attack works were tried; 1 cells failed") == 1
    write(tmp_path, "sig", "abl", 0, 0.9, status="failed", error="no")
    write(tmp_path, "bpp", "nab", 0, 0.9, status="attack failed", told_by="another")
    page = markdown(read_results(tmp_path))
    assert "that all defences but abl have:" in page and "- abl: nothing is known; 1 cells failed" in page
    assert "1 attack failed, 2 failed (1 told by another cell);" in page
    (tmp_path / "cells" / "badnets-nab-0.json").unlink()
    assert "that all defences have" not in markdown(read_results(tmp_path))


def test_every_column_shows_its_own_figure(tmp_path: Path) -> None:
    detection = {"precision": 0.11, "recall": 0.12, "auroc": 0.13, "tpr_at_1pct": 0.14, "tpr_at_01pct": 0.15}
    figures = {
        "defended": {"acc": rate(0.9), "asr": rate(0.2), "ra": rate(0.27), "retuned": rate(0.25), "worst": rate(0.4)},
        "acc_gap": rate(0.01), "detection": {name: rate(value) for name, value in detection.items()},
        "relabel_accuracy": rate(0.16), "rejects": {"clean": rate(0.17), "triggered": rate(0.18)}, "altered": rate(0.21),
        "der": rate(0.22), "der_ceiling": 0.23, "excess_asr": rate(0.24),
    }  # fmt: skip
    write(tmp_path, "several", "nab", 0, 0.2, figures=figures, relative_seconds={"scan": 1.0, "total": 3.5})
    page = markdown(read_results(tmp_path))
    (found,) = [row[3:] for row in rows(page, "resnet") if row[1:4] == ["nab", "several", "20 %"] and row[4].startswith("0.110")]
    assert [float(field.split()[0]) for field in found[1:]] == [0.11, 0.12, 0.13, 0.14, 0.15, 0.16, 0.17, 0.18]
    (found,) = [row[3:] for row in rows(page, "resnet") if row[1:4] == ["nab", "several", "20 %"] and row[4].startswith("0.210")]
    assert [float(field.split()[0]) for field in found[1:]] == [0.21, 0.22, 0.23, 0.24, 0.25, 0.4, 0.27, 3.5]
    # of several triggers the one that works best counts
    assert "several at 20 % on resnet, ASR 0.400" in page and "0.400 [0.350, 0.450] / 0.010" in page


def test_an_attack_is_told_by_its_two_twins(tmp_path: Path) -> None:
    """Of several triggers by the one that works best; by the one that works least beside it, since that one must work, too."""
    several = [{"acc": 0.87, "asr": 0.8, "worst": 0.95, "least": 0.72}, {"acc": 0.91, "asr": 0.1, "worst": 0.15, "least": 0.05}]
    two = {name: {key: rate(value) for key, value in twin.items()} for name, twin in zip(TWINS, several, strict=True)}
    another = {"undefended": {"acc": rate(0.86), "asr": rate(0.75)}, "oracle": {"acc": rate(0.94), "asr": rate(0.1)}}
    for defence in ("drop", "nab"):  # whose twins are counted once
        write(tmp_path, "blend", defence, 0, 0.3)
        write(tmp_path, "several", defence, 0, 0.3, twins=two)
    write(tmp_path, "blend", "drop", 1, 0.3, twins=another)
    write(tmp_path, "none", "drop", 0, None)
    page = markdown(read_results(tmp_path))
    (titles,) = (row for row in rows(page, "network") if "ASR undefended" in row)
    found = {row[1]: dict(zip(titles[3:], row[3:], strict=True)) for row in rows(page, "resnet") if len(row) == len(titles)}
    assert list(found["several"].values()) == ["0.870", "0.950", "0.720", "0.910", "0.150", "1"]
    assert list(found["none"].values()) == ["0.880", "", "", "0.920", "", "1"]
    assert list(found["blend"].values()) == ["0.870 ± 0.014", "0.860 ± 0.156", "", "0.930 ± 0.014", "0.070 ± 0.042", "2"]
    assert titles[3:] == [
        "ACC undefended", "ASR undefended", "least of several triggers", "ACC oracle", "ASR oracle (natural rate)", "seeds",
    ]  # fmt: skip


def test_what_a_defence_does_not_say_is_left_empty(tmp_path: Path) -> None:
    figures = {"defended": {"acc": rate(0.9), "asr": rate(0.1)}, "altered": None, "detection": None, "der": rate(0.4)}
    write(tmp_path, "badnets", "pdb", 0, 0.1, figures=figures)
    page = markdown(read_results(tmp_path))
    (row,) = (row for row in rows(page, "resnet") if row[1] == "pdb" and len(row) == 12)
    assert row[2:6] == ["badnets", "20 %", "", "0.400 (1)"]


def test_two_cells_in_one_place_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "badnets", "drop", 0, 0.1)
    write(tmp_path / "older", "badnets", "drop", 0, 0.9, key="older")
    with pytest.raises(ValueError, match=r"holds badnetsdrop0 and older for resnet badnets 0\.2 0 drop: delete one"):
        read_results(tmp_path)


def test_a_row_that_defends_nothing_has_no_worst_attack(tmp_path: Path) -> None:
    for row, kind in (("plain", "none"), ("twin", "oracle"), ("ours", "nab")):
        write(tmp_path, "badnets", row, 0, 1.0, config={"recipe": {}, "defence": {"name": kind}})
    page = markdown(read_results(tmp_path))
    assert "- ours: " in page and "- plain: " not in page and "- twin: " not in page


def test_copies_of_a_cell_are_not_seeds(tmp_path: Path) -> None:
    for folder in ("one", "copy"):
        write(tmp_path / folder, "badnets", "drop", 0, 0.1)
    with pytest.raises(ValueError, match="holds badnetsdrop0 and badnetsdrop0 for resnet"):
        read_results(tmp_path)


def test_rows_that_were_not_made_alike_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "badnets", "drop", 0, 0.1, config={"recipe": {"size": 1}, "defence": {"name": "drop"}})
    write(tmp_path, "badnets", "nab", 0, 0.1, config={"recipe": {"size": 1}, "defence": {"name": "nab"}})
    assert len(read_results(tmp_path).records) == 2
    write(tmp_path, "badnets", "nab", 0, 0.1, config={"recipe": {"size": 2}, "defence": {"name": "nab"}})
    with pytest.raises(ValueError, match=r"resnet badnets 0\.2 0 nab, have other twins: made by other settings"):
        read_results(tmp_path)
    other = {"undefended": {"acc": {"value": 0.5}}, "oracle": {}}
    write(tmp_path, "badnets", "nab", 0, 0.1, config={"recipe": {"size": 1}, "defence": {"name": "nab"}}, twins=other)
    with pytest.raises(ValueError, match="have other twins"):
        read_results(tmp_path)


def test_seeds_of_other_settings_are_told(tmp_path: Path) -> None:
    for seed, asr in ((0, 0.1), (1, 0.2)):
        recipe = {"seed": seed, "attack": {"seed": 7 + seed, "name": "badnets"}}
        write(tmp_path, "badnets", "drop", seed, asr, config={"recipe": recipe, "defence": {"name": "drop"}})
        nab = {"name": "nab", "params": {"rounds": seed}}
        write(tmp_path, "badnets", "nab", seed, asr, config={"recipe": recipe, "defence": nab})
    page = markdown(read_results(tmp_path))
    assert page.count("other settings") == 1
    assert "**Seeds of other settings each are averaged in: badnets at 20 % by nab on resnet.**" in page


def test_a_broken_file_is_named_and_those_of_twins_are_not_read(tmp_path: Path) -> None:
    write(tmp_path, "badnets", "drop", 0, 0.1)
    (tmp_path / "twins").mkdir()
    (tmp_path / "twins" / "half.json").write_text("{")
    assert len(read_results(tmp_path).records) == 1
    (tmp_path / "cells" / "half.json").write_text("{")
    with pytest.raises(ValueError, match=r"half.json is not valid JSON: .*; delete it, and if it was a cell that is run again"):
        read_results(tmp_path)


def test_a_folder_without_cells_is_refused(tmp_path: Path) -> None:
    io.save_json(tmp_path / "result.json", {"models": {}})
    with pytest.raises(ValueError, match="no finished cell"):
        read_results(tmp_path)


def test_one_seed_has_an_interval_and_networks_have_rows_of_their_own(tmp_path: Path) -> None:
    rate = {"value": 0.2, "n": 10, "low": 0.05, "high": 0.45}
    defended = {"acc": rate, "asr": rate, "ra": rate}
    figures = {"defended": defended, "acc_gap": 0.0, "detection": None, "rejects": None, "der": None}
    for network, commit in (("resnet", "a" * 40), ("vit", "b" * 40 + "+")):
        place = {"network": network, "attack": "badnets", "rate": 0.1, "seed": 0, "defence": "drop"}
        write(
            tmp_path / network, "badnets", "drop", 0, 0.1, cell=place, key=network, figures=figures, commit=commit, hardware="x"
        )
    page = markdown(read_results(tmp_path))
    assert page.count("| badnets | 0.200 [0.050, 0.450] / 0.000 (1) |") == 2
    assert {row[1] for name in ("resnet", "vit") for row in rows(page, name)} == {"badnets", "drop"}
    assert "Made by commits: aaaaaaa (1); bbbbbbb+ (1), on processors: x (2)." in page
