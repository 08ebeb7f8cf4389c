"""Names of folders, files and classes: the order that they give, those that are no UTF-8, and images without a class."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset

from nab_defense.data import open_source
from nab_defense.data.folder import decode
from nab_defense.io import load_csv, save_csv


def write(folder: Path, *names: str) -> None:
    folder.mkdir()
    for name in names or ["0.png"]:
        Image.new("RGB", (8, 8)).save(folder / name)


def test_classes_come_in_the_order_that_timm_gives_them(tmp_path: Path) -> None:
    names = ("2", "10", "1", "b", "A", "c10", "c9")
    for name in names:
        write(tmp_path / name)
    theirs = create_dataset("", root=str(tmp_path)).reader.class_to_idx
    assert open_source(str(tmp_path)).classes == tuple(sorted(names, key=theirs.get)) == ("1", "2", "10", "A", "b", "c9", "c10")


def test_files_come_in_the_order_in_which_timm_reads_them(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / name, *(f"img{n}.png" for n in (1, 2, 10, 11)), "IMG3.png")
    theirs = create_dataset("", root=str(tmp_path))
    source = open_source(str(tmp_path))
    assert list(source.ids) == [theirs.filename(i) for i in range(10)] and source.ids[1:4] == (
        "a/img2.png",
        "a/IMG3.png",
        "a/img10.png",
    )
    assert source.labels.tolist() == [label for _, label in theirs.reader.samples]
    assert open_source(str(tmp_path), labelled=False).ids == source.ids


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"b"):
        write(Path(os.fsdecode(bytes(tmp_path) + b"/" + name)))
    source = open_source(str(tmp_path))
    assert len(source) == 2 and len(source.fingerprint) == 64
    save_csv(tmp_path / "names.csv", ["id"], [[ident] for ident in source.ids])
    assert load_csv(tmp_path / "names.csv", ["id"]) == [{"id": "b/0.png"}, {"id": "caf\\udce9/0.png"}]


@pytest.mark.parametrize(("channels", "told"), [(None, True), (3, True), (1, False)])
def test_grey_images_are_odd_where_the_network_takes_color(channels: int | None, told: bool, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name)
        Image.new("L", (8, 8)).save(tmp_path / name / "grey.png")
        Image.new("P", (8, 8)).save(tmp_path / name / "palette.png")
    grey = {"grey": ["a/grey.png", "b/grey.png"]} if told else {}
    expected = {"palette": ["a/palette.png", "b/palette.png"], **grey}
    assert open_source(str(tmp_path), channels=channels).irregular == expected
    for path in tmp_path.glob("*/[0p]*.png"):
        path.unlink()
    assert channels == 3 or open_source(str(tmp_path), channels=channels).irregular == {}


def test_images_without_a_label_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [(Image.new("RGB", (4, 4)), label) for label in (0, 1, -1)]
    monkeypatch.setattr("nab_defense.data.named.create_dataset", lambda *_, **__: data)
    with pytest.raises(ValueError, match="torch/named has 1 images without a label; name another split of it"):
        open_source("torch/named")


def test_links_are_followed_and_one_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    write(tmp_path / "elsewhere", "1.png")
    write(root / "a")
    write(root / "b")
    (root / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "linked" / "up").symlink_to(root)  # round and round
    assert open_source(str(root)).ids == ("a/0.png", "a/linked/1.png", "b/0.png")
    (root / "a" / "gone.png").symlink_to(tmp_path / "missing.png")
    with pytest.raises(ValueError, match=r"1 of 4 files in .* cannot be read: a/gone\.png \(unreadable\)"):
        open_source(str(root))


def test_a_dark_image_of_16_bits_is_dark(tmp_path: Path) -> None:
    for number, value in enumerate((250, 512, 65535)):
        write(tmp_path / str(number))
        Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / str(number) / "0.png")
    assert [image.max() for image in map(open_source(str(tmp_path)).pixels, range(3))] == [1, 2, 255]


@pytest.mark.parametrize(("value", "read"), [(0.5, 128), (1.0001, 255), (200.0, 200), (65535.0, 255)])
def test_an_image_of_floats(value: float, read: int) -> None:
    buffer = BytesIO()
    Image.fromarray(np.full((8, 8), value, np.float32)).save(buffer, "tiff")
    assert np.asarray(decode(buffer.getvalue())[0]).max() == read
