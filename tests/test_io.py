from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from nab_defense import io

SAVERS: dict[str, Callable[[Path, int], None]] = {
    "json": lambda path, n: io.save_json(path, {"n": n}),
    "yaml": lambda path, n: io.save_yaml(path, {"n": n}),
    "csv": lambda path, n: io.save_csv(path, ["n"], [[n]]),
    "arrays": lambda path, n: io.save_arrays(path, {"n": np.array([n])}),
    "tensors": lambda path, n: io.save_tensors(path, {"n": torch.tensor([n])}, {}),
    "state": lambda path, n: io.save_state(path, {"n": n}),
}
LOADERS: dict[str, Callable[[Path], Any]] = {
    "json": io.load_json,
    "yaml": io.load_yaml,
    "csv": lambda path: io.load_csv(path, ["n"]),
    "arrays": io.load_arrays,
    "tensors": io.load_tensors,
    "state": io.load_state,
}


class Disk(Exception):
    """A full disk, say."""


@pytest.mark.parametrize("broken", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("kind", SAVERS)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    kind: str, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    SAVERS[kind](path, 1)
    old = path.read_bytes()

    def fail(*args: Any) -> None:
        raise Disk

    with monkeypatch.context() as patch:
        patch.setattr(f"nab_defense.io.os.{broken}", fail)
        with pytest.raises(Disk):
            SAVERS[kind](path, 2)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
    SAVERS[kind](path, 2)
    assert path.read_bytes() != old and list(tmp_path.iterdir()) == [path]


def test_a_write_that_stops_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    io.save_json(path, [1])

    def half(stream: Any) -> None:
        stream.write(b"[1, 2")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        io._write(path, half)
    assert io.load_json(path) == [1] and list(tmp_path.iterdir()) == [path]


def test_values_that_a_format_cannot_hold_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        io.save_json(tmp_path / "a", float("nan"))
    with pytest.raises(TypeError):
        io.save_json(tmp_path / "a", object())
    assert list(tmp_path.iterdir()) == []


def test_folders_are_made_and_files_are_readable_by_all(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.json"
    io.save_json(path, None)
    assert io.load_json(path) is None and path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train:\n  lr: 0.1\nscan: {}\ntrain:\n  epochs: 2\n", "'train' twice, in lines 1 and 4"),
        ("stages:\n- {size: 3, size: 4}\n", "'size' twice, in lines 2 and 2"),
        ("a: {b: 1}\nc:\n  d: 1\n  e: 2\n  d: 3\n", "'d' twice, in lines 3 and 5"),
    ],
)
def test_a_key_that_is_there_twice_in_yaml_is_refused(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"mine.yaml has {told}; make them one"):
        io.load_yaml(tmp_path / "mine.yaml")


def test_yaml_may_say_the_same_of_several_and_lead_back_to_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("a: &one {b: 1}\nc: *one\nd: {b: 2}\ne: &two [*two]\n")
    found = io.load_yaml(tmp_path / "mine.yaml")
    assert (found["a"], found["c"], found["d"]) == ({"b": 1}, {"b": 1}, {"b": 2}) and found["e"][0] is found["e"]


def test_json_and_yaml_round_trip(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True, "ü\n\u2028"], "a": {"x": -0.1, "on": "off"}}
    for save, load in ((io.save_json, io.load_json), (io.save_yaml, io.load_yaml)):
        save(tmp_path / "f", value)
        loaded = load(tmp_path / "f")
        assert loaded == value and list(loaded) == ["b", "a"]


def test_csv_round_trip_with_awkward_names(tmp_path: Path) -> None:
    names = ["plain", "comma, quote \" and 'quote'", "two\nlines", "ü\u2028\x0c\x85", "", " space "]
    io.save_csv(tmp_path / "f.csv", ["id", "n"], [(name, i) for i, name in enumerate(names)])
    rows = io.load_csv(tmp_path / "f.csv", ["n", "id"])
    assert rows == [{"id": name, "n": str(i)} for i, name in enumerate(names)]
    with pytest.raises(ValueError, match="has no column 'true'; it has: id, n"):
        io.load_csv(tmp_path / "f.csv", ["id", "true"])
    (tmp_path / "f.csv").write_text('id,n\n"' + 150_000 * "x")  # a quote that nothing closes
    with pytest.raises(ValueError, match=r"f\.csv is not valid CSV, line .*: field larger than"):
        io.load_csv(tmp_path / "f.csv", ["id"])


def test_arrays_round_trip_without_pickle(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    arrays = {"f": drawn, "b": np.array([True, False]), "e": np.zeros((0, 4))}
    io.save_arrays(tmp_path / "a.npz", arrays, {"x": [1, "ü"]})
    loaded, meta = io.load_arrays(tmp_path / "a.npz")
    assert meta == {"x": [1, "ü"]} and set(loaded) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype
    np.savez(tmp_path / "foreign.npz", a=np.arange(3))
    loaded, meta = io.load_arrays(tmp_path / "foreign.npz")
    assert loaded["a"].tolist() == [0, 1, 2] and meta is None


def test_tensors_round_trip(tmp_path: Path) -> None:
    tensors = {
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "view": torch.arange(10)[::2],
        "scalar": torch.tensor(3),
        "half": torch.randn(3).bfloat16(),
        "learned": torch.ones(2, requires_grad=True),
    }
    io.save_tensors(tmp_path / "t", tensors, {"format": "x", "n": 1, "list": [0.1]})
    loaded, meta = io.load_tensors(tmp_path / "t")
    assert meta == {"format": "x", "n": 1, "list": [0.1]} and set(loaded) == set(tensors)
    assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_tensors_of_another_program_keep_their_words(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "t", metadata={"format": "pt"})
    assert io.load_tensors(tmp_path / "t")[1] == {"format": "pt"}


def test_state_round_trip(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    io.save_state(tmp_path / "s", {"optimizer": optimizer.state_dict(), "history": [{"loss": 0.5, "epoch": 1}], "none": None})
    loaded = io.load_state(tmp_path / "s")
    assert loaded["history"] == [{"loss": 0.5, "epoch": 1}] and loaded["none"] is None
    torch.testing.assert_close(loaded["optimizer"], optimizer.state_dict(), rtol=0, atol=0)


class Harmful:
    """What a pickle can do: call anything while it is read."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return Path.touch, (self.witness,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_is_unpickled(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    harmful = Harmful(witness)
    (tmp_path / "plain").write_bytes(pickle.dumps(harmful))
    torch.save({"x": harmful}, tmp_path / "torch")
    np.savez(tmp_path / "numpy.npz", x=np.array([harmful], dtype=object))
    (tmp_path / "yaml").write_text(f"!!python/object/apply:pathlib.Path.touch [{witness}]")
    for name in ("plain", "torch", "numpy.npz", "yaml"):
        for load in LOADERS.values():
            with pytest.raises(ValueError):
                load(tmp_path / name)
    assert not witness.exists()


@pytest.mark.parametrize("kind", LOADERS)
def test_missing_and_broken_files_give_one_line(kind: str, tmp_path: Path) -> None:
    (tmp_path / "zeros").write_bytes(bytes(100))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{[:\n\t" * 30)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    SAVERS[kind](tmp_path / "whole", 1)
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-3])
    for name in ("missing", "zeros", "bytes", "empty", "folder", "cut"):
        path = tmp_path / name
        if (name == "empty" and kind == "yaml") or (name == "cut" and kind in ("yaml", "csv")):
            continue  # an empty YAML file is a null, and a shorter text is a text
        with pytest.raises(ValueError) as caught:
            LOADERS[kind](path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        if name == "missing":
            assert str(caught.value) == f"no such file: {path}"


def test_an_npz_with_another_meta_is_refused_with_its_path(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.txt", json.dumps(1))
    np.savez(tmp_path / "b.npz", meta=np.array("not json"))
    with pytest.raises(ValueError, match=r"b\.npz is not an npz file of this package"):
        io.load_arrays(tmp_path / "b.npz")


def test_a_csv_that_a_spreadsheet_saved(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_bytes(b"\xef\xbb\xbfid,n\r\na,1\r\n")
    assert io.load_csv(tmp_path / "f.csv", ["id"]) == [{"id": "a", "n": "1"}]
