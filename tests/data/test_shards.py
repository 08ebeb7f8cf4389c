"""WebDataset shards: the images of a folder, under ids that stay, and one line for what is wrong with them."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nab_defense.cli import main
from nab_defense.data import Source, open_source

Files = list[tuple[str, bytes]]


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def shard(path: Path, files: Files) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(number: int, label: int) -> Files:
    return [(f"part/{number:04d}.png", png(number)), (f"part/{number:04d}.cls", f"{label}\n".encode())]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of four images, the second one's labels before their images; label = number % 2."""
    for place in (1, 0):
        files = [file for number in range(4 * place, 4 * place + 4) for file in sample(number, number % 2)]
        shard(tmp_path / f"train-{place:06d}.tar", files[:: 1 - 2 * place])
    return tmp_path


def folder_of(shards: Path) -> Source:
    for number in range(8):
        path = shards / "folder" / "ab"[number % 2] / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return open_source(str(shards / "folder"))


def test_shards_hold_what_a_folder_holds(shards: Path) -> None:
    found, folder = open_source(f"wds/{shards}"), folder_of(shards)
    assert found.classes == ("0", "1") and found.mode == folder.mode == "RGB"
    assert found.ids[0] == "train-000000.tar/part/0000.png" and len(set(found.ids)) == len(found) == 8
    for index, name in enumerate(found.ids):
        number = int(name[-8:-4])
        assert found.labels[index] == number % 2
        other = next(i for i, own in enumerate(folder.ids) if own.endswith(name[-8:]))
        np.testing.assert_array_equal(found.pixels(index), folder.pixels(other))
    alone = pickle.loads(pickle.dumps(found.load))  # noqa: S301  # a loader's process has no cache: it reads the shard
    np.testing.assert_array_equal(np.asarray(alone(3)), found.pixels(3))


def test_names_and_fingerprint(shards: Path) -> None:
    before = open_source(f"wds/{shards}")
    assert open_source(f"wds/{shards}").fingerprint == before.fingerprint
    (shards / "classes.txt").write_text("cat\ndog\n")
    assert open_source(f"wds/{shards}").classes == ("cat", "dog")
    shard(shards / "train-000001.tar", [file for number in range(4, 8) for file in sample(number + 1, number % 2)])
    assert open_source(f"wds/{shards}").fingerprint != before.fingerprint


def test_mistakes_are_one_line(shards: Path, tmp_path: Path) -> None:
    def refused(name: str, files: Files | None = None) -> str:
        if files is not None:
            shard(tmp_path / name / "x.tar", files)
        with pytest.raises(ValueError) as caught:
            open_source(f"wds/{tmp_path / name}")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no *.tar" in refused("nowhere")
    assert "a.png has no label; expected a.cls" in refused("unlabelled", [("a.png", png(0))])
    assert "holds b'cat', expected the number" in refused("words", [("a.png", png(0)), ("a.cls", b"cat")])
    assert "holds two images, a.png and a.big.jpg" in refused(
        "twice", [("a.png", png(0)), ("a.big.jpg", png(1)), ("a.cls", b"0")]
    )
    assert "hold no image" in refused("empty", [("a.cls", b"0")])
    assert "1 of 3 files" in refused("broken", [*sample(0, 0), *sample(1, 1), ("c.png", b"no"), ("c.cls", b"1")])
    assert "x.tar/a.png has label 20231231, of 1 images" in refused("date", [("a.png", png(0)), ("a.cls", b"20231231")])
    (tmp_path / "zipped").mkdir()
    (tmp_path / "zipped" / "x.tar").write_bytes(gzip.compress((shards / "train-000000.tar").read_bytes()))
    assert "is not a plain tar" in refused("zipped")
    (shards / "classes.txt").write_text("cat\n")
    with pytest.raises(ValueError, match="names 1 classes, the shards have labels up to 1"):
        open_source(f"wds/{shards}")


def test_a_scan_names_samples_by_their_ids(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for place in range(2):
        files = [file for number in range(30) for file in sample(30 * place + number, int(rng.integers(2)))]
        shard(tmp_path / "shards" / f"{place}.tar", files)
    out = tmp_path / "scan"
    argv = ["scan", f"wds/{tmp_path / 'shards'}", "--out", str(out), "rule=paper", "scan.epochs=1", "relabel.params.epochs=1"]
    assert main(argv) == 0
    rows = (out / "suspects.csv").read_text().splitlines()[1:]
    assert len(rows) == 3 and all(row.split(",")[0][:10] in ("0.tar/part", "1.tar/part") for row in rows)


def test_what_is_hidden_is_left_out(tmp_path: Path) -> None:
    """Archives of macOS hold a "._name" beside each file, those of tar names that begin with "./"."""
    hidden, plain = [("part/._0000.png", b"no"), (".x/c.png", b"no")], [("./b.png", png(1)), ("./b.cls", b"1")]
    shard(tmp_path / "x.tar", [*sample(0, 0), *hidden, *plain])
    assert open_source(f"wds/{tmp_path}").ids == ("x.tar/part/0000.png", "x.tar/./b.png")
