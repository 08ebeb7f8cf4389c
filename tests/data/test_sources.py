from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nab_defense.data import open_source
from nab_defense.data.sources import Source

ODD = {  # file name -> kind, each also the maker's key below
    "grey.png": "grey",
    "one_bit.png": "grey",
    "grey_alpha.png": "grey",
    "palette.png": "palette",
    "deep.png": "16-bit",
    "alpha.png": "alpha",
    "cmyk.jpg": "CMYK",
    "empty.png": "zero-byte",
    "text.jpg": "unreadable",
    "cut.jpg": "truncated",
}


def pixels(seed: int, shape: tuple[int, ...] = (8, 8, 3), high: int = 256) -> Any:
    return np.random.default_rng(seed).integers(0, high, shape)


def color(seed: int = 0) -> Image.Image:
    return Image.fromarray(pixels(seed).astype(np.uint8))


def write(path: Path, image: Image.Image | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image) if isinstance(image, bytes) else image.save(path)


def encoded(image: Image.Image, format: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format)
    return stream.getvalue()


def odd(name: str) -> Image.Image | bytes:
    if name == "cut.jpg":
        return encoded(color().resize((64, 64)), "JPEG")[:-400]
    made: dict[str, Callable[[], Image.Image | bytes]] = {
        "grey.png": lambda: color().convert("L"),
        "one_bit.png": lambda: color().convert("1"),
        "grey_alpha.png": lambda: color().convert("LA"),
        "palette.png": lambda: color().convert("P"),
        "deep.png": lambda: Image.fromarray(pixels(1, (8, 8), 65536).astype(np.uint16)),
        "alpha.png": lambda: color().convert("RGBA"),
        "cmyk.jpg": lambda: color().convert("CMYK"),
        "empty.png": lambda: b"",
        "text.jpg": lambda: b"<html>not found</html>",
    }
    return made[name]()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three images."""
    root = tmp_path / "set"
    for seed, name in enumerate(("cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png", "dog/1.png", "dog/2.png")):
        write(root / name, color(seed))
    return root


def test_digits_are_split_once_and_for_all() -> None:
    train, test = open_source("digits"), open_source("digits", split="test")
    assert (len(train), len(test)) == (1438, 359) and not set(train.ids) & set(test.ids)
    assert train.ids[:5] == ("digits/0000", "digits/0001", "digits/0002", "digits/0003", "digits/0005")
    assert test.ids[0] == "digits/0004" and test.ids[-1] == "digits/1794"
    assert train.labels[:6].tolist() == [0, 1, 2, 3, 5, 6] and train.labels.dtype == np.int64
    assert train.classes == tuple("0123456789") and train.mode == "L" and train.channels == 1
    shown = train.pixels(0)
    assert shown.shape == (8, 8, 1) and shown.dtype == np.uint8 and shown[0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert open_source("digits").fingerprint == train.fingerprint != test.fingerprint
    with pytest.raises(ValueError, match=r"digits has no split 'tests'; known: train, .* did you mean 'test'"):
        open_source("digits", split="tests")


def test_a_folder_is_read_in_order(folder: Path) -> None:
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    write(folder / "dog" / "deeper" / "x.PNG", color(9))
    source = open_source(str(folder))
    assert source.ids == ("cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png", "dog/1.png", "dog/2.png", "dog/deeper/x.PNG")
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1, 1] and source.classes == ("cat", "dog")
    assert source.mode == "RGB" and source.irregular == {}
    for index, seed in enumerate((0, 1, 2, 3, 4, 5, 9)):
        np.testing.assert_array_equal(source.pixels(index), pixels(seed))
    view = source.view(lambda image: image.size)
    assert view[4] == ((8, 8), 1) and view.filename(6) == "dog/deeper/x.PNG" and view.filename(6, basename=True) == "x.PNG"
    assert view.fingerprint == source.fingerprint and len(view) == 7


def test_without_labels_a_folder_is_all_the_images_below_it(folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    for place in ("b.png", "a.png", "deep/er/c.png", ".hidden/d.png", ".e.png"):
        write(flat / place, color(len(place)))
    source = open_source(str(flat), labelled=False)
    assert source.ids == ("a.png", "b.png", "deep/er/c.png") and source.labels.tolist() == [0, 0, 0]
    assert np.array_equal(source.pixels(2), np.asarray(color(len("deep/er/c.png"))))
    for place in (".ipynb_checkpoints/0-checkpoint.png", "cat/.ipynb_checkpoints/0-checkpoint.png", "dog/._0.png"):
        write(folder / place, b"")
    by_class, any_way = open_source(str(folder)), open_source(str(folder), labelled=False)
    assert by_class.ids == any_way.ids and by_class.fingerprint != any_way.fingerprint
    with pytest.raises(ValueError, match="expected one for each class"):
        open_source(str(flat / "deep" / "er"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        open_source(str(tmp_path / "empty"), labelled=False)


def test_every_oddity_is_counted_and_named(folder: Path) -> None:
    for name in ODD:
        write(folder / "dog" / name, odd(name))
    with pytest.raises(ValueError, match=r"3 of 16 files in .* cannot be read") as caught:
        open_source(str(folder))
    assert all(f"dog/{name} ({ODD[name]})" in str(caught.value) for name in ("empty.png", "text.jpg", "cut.jpg"))
    assert "data.strict=false" in str(caught.value) and "\n" not in str(caught.value)
    source = open_source(str(folder), strict=False)
    expected: dict[str, list[str]] = {}
    for name in sorted(ODD):
        expected.setdefault(ODD[name], []).append(f"dog/{name}")
    assert source.irregular == expected
    assert len(source) == 13 and source.mode == "RGB" and all(source.image(i).mode == "RGB" for i in range(13))
    left = {name: index for index, name in enumerate(source.ids)}
    assert "dog/cut.jpg" not in left
    grey = np.asarray(color().convert("L"))
    np.testing.assert_array_equal(source.pixels(left["dog/grey.png"]), np.repeat(grey[..., None], 3, 2))
    np.testing.assert_array_equal(source.pixels(left["dog/alpha.png"]), pixels(0))


def test_leaving_files_out_shifts_nothing(folder: Path) -> None:
    (folder / "cat" / "1.png").write_bytes(b"")
    source = open_source(str(folder), strict=False)
    assert source.ids == ("cat/0.png", "cat/2.png", "dog/0.png", "dog/1.png", "dog/2.png")
    assert source.labels.tolist() == [0, 0, 1, 1, 1]
    for index, seed in enumerate((0, 2, 3, 4, 5)):
        np.testing.assert_array_equal(source.pixels(index), pixels(seed))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_a_file_cut_anywhere_is_an_image_or_is_named(format: str, folder: Path) -> None:
    data = encoded(color(), format)
    for length in range(1, len(data), max(1, len(data) // 60)):
        write(folder / "dog" / f"cut{length:05d}.png", data[:length])
    source = open_source(str(folder), strict=False)
    named = [name for kind in ("truncated", "unreadable") for name in source.irregular.get(kind, [])]
    assert len(named) > 0 and not set(named) & set(source.ids)
    assert all(source.image(index).size == (8, 8) for index in range(len(source)))


@pytest.mark.parametrize("scale", [65535, 4000])
def test_16_bits_are_scaled_and_not_clipped(scale: int, folder: Path) -> None:
    values = np.linspace(0, scale, 64).astype(np.uint16).reshape(8, 8)
    write(folder / "dog" / "deep.png", Image.fromarray(values))
    source = open_source(str(folder))
    seen = source.pixels(source.ids.index("dog/deep.png")).astype(float)
    np.testing.assert_allclose(seen, np.repeat(values[..., None], 3, 2) / 257, atol=0.51)


def test_floats_in_0_to_1_do_not_turn_black(folder: Path) -> None:
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    write(folder / "dog" / "float.tif", Image.fromarray(values))
    source = open_source(str(folder))
    np.testing.assert_allclose(source.pixels(source.ids.index("dog/float.tif"))[..., 0], values * 255, atol=0.51)


@pytest.mark.parametrize("kind", ["8-bit", "16-bit"])
def test_only_grey_images(kind: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("a/0.png", "a/1.png", "b/0.png")):
        deep = pixels(seed, (8, 8), 65536).astype(np.uint16)
        write(tmp_path / name, Image.fromarray(deep) if kind == "16-bit" else color(seed).convert("L"))
    assert open_source(str(tmp_path)).mode == open_source(str(tmp_path), channels=1).mode == "L"
    with pytest.raises(ValueError, match=r"are grey and the model takes 3 channels; to train on them set model.in_chans=1"):
        open_source(str(tmp_path), channels=3)
    write(tmp_path / "b/1.png", color())
    assert open_source(str(tmp_path)).mode == open_source(str(tmp_path), channels=3).mode == "RGB"
    assert open_source(str(tmp_path), channels=1).pixels(3).shape == (8, 8, 1)


def test_what_is_missing_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    def refusal(name: Path | str, **options: Any) -> str:
        with pytest.raises(ValueError) as caught:
            open_source(str(name), **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert refusal(tmp_path / "sett").endswith("sett; did you mean 'set'?")
    assert "no sub-folders; expected one for each class" in refusal(folder / "cat")
    assert refusal(folder / "cat" / "0.png").endswith("0.png is a file, expected a folder")
    (folder / "bird").mkdir()
    mend = "fill it, or remove it if a model without it is to be trained"
    assert refusal(folder) == f"class 'bird' of {folder} has no readable image; {mend}"
    write(folder / "bird" / "0.png", b"broken")
    assert "class 'bird'" in refusal(folder, strict=False)
    write(tmp_path / "lone" / "cat" / "0.png", color())
    assert "has one class ('cat'); a classifier needs at least two" in refusal(tmp_path / "lone")
    write(tmp_path / "none" / "cat" / "0.txt", b"")
    assert "holds no image" in refusal(tmp_path / "none")
    write(tmp_path / "bad" / "cat" / "0.png", b"")
    write(tmp_path / "bad" / "dog" / "0.png", b"x")
    assert "none of the 2 files in" in refusal(tmp_path / "bad", strict=False)
    assert refusal("digits", channels=2) == "channels must be 1 or 3, got 2"
    assert "timm cannot open 'torch/no_such'" in refusal("torch/no_such")


def test_the_fingerprint_follows_bytes_labels_and_names(folder: Path) -> None:
    first = open_source(str(folder)).fingerprint
    copied = folder.parent / "elsewhere"
    for path in sorted(folder.rglob("*.png"), reverse=True):
        write(copied / path.relative_to(folder), path.read_bytes())
    assert open_source(str(copied)).fingerprint == first == open_source(str(folder)).fingerprint
    found = [first]
    cat, dog = copied / "cat", copied / "dog"
    changes: list[Callable[[], Any]] = [
        lambda: (cat / "0.png").write_bytes((cat / "0.png").read_bytes() + b"\0"),
        lambda: (cat / "1.png").rename(dog / "9.png"),
        lambda: (cat / "2.png").rename(cat / "3.png"),
        lambda: (dog / "0.png").unlink(),
    ]
    for change in changes:
        change()
        found.append(open_source(str(copied)).fingerprint)
    assert len(set(found)) == 5


def test_subset_limited_and_replaced(folder: Path) -> None:
    source = open_source(str(folder))
    some = source.subset([4, 1])
    assert some.ids == ("dog/1.png", "cat/1.png") and some.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(some.pixels(0), pixels(4))
    np.testing.assert_array_equal(some.subset([1]).pixels(0), pixels(1))
    assert source.limited(None, 0) is source is source.limited(6, 0)
    draws = [source.limited(3, seed) for seed in range(8)]
    assert all(list(draw.ids) == sorted(draw.ids) and len(draw) == 3 for draw in draws)
    assert len({draw.ids for draw in draws}) > 1 and source.limited(3, 5).ids == draws[5].ids
    assert source.limited(3, 5).fingerprint == draws[5].fingerprint != source.fingerprint
    other = source.replaced(labels=1 - source.labels, load=source.load, change="flip")
    again = source.replaced(labels=source.labels, load=source.load, change="paint")
    assert len({source.fingerprint, other.fingerprint, again.fingerprint, some.fingerprint}) == 4
    assert other.labels.tolist() == [1, 1, 1, 0, 0, 0] and other.ids == source.ids


def check_named(source: Source) -> None:
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1] and source.classes == ("cat", "dog") and source.mode == "RGB"
    for index in range(6):
        np.testing.assert_array_equal(source.pixels(index), pixels(index))


def test_torchvision_by_way_of_timm(folder: Path) -> None:
    source = open_source("torch/image_folder", root=str(folder))
    check_named(source)
    assert source.ids[0] == "torch/image_folder/train/0"
    assert open_source("torch/image_folder", root=str(folder), channels=1).pixels(0).shape == (8, 8, 1)
    before = source.fingerprint
    write(folder / "dog/2.png", color(7))
    assert open_source("torch/image_folder", root=str(folder)).fingerprint != before


@pytest.mark.parametrize("place", [0, 1, 63, 197, 198, 299])
def test_any_one_image_shows_in_the_fingerprint_of_a_named_set(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Named:
        def __init__(self) -> None:
            self.images = pixels(0, (300, 4, 4, 3)).astype(np.uint8)
            self.targets = [index % 2 for index in range(300)]

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.fromarray(self.images[index]), self.targets[index]

    first, other = Named(), Named()
    other.images[place, 2, 1, 0] ^= 1
    found = []
    for data in (first, other, Named()):
        monkeypatch.setattr("nab_defense.data.named.create_dataset", lambda *_, data=data, **__: data)
        found.append(open_source("torch/named").fingerprint)
    assert found[0] == found[2] != found[1]


def test_hugging_face_by_way_of_timm(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    for path in sorted(folder.rglob("*.png")):
        write(tmp_path / "hub" / "train" / path.relative_to(folder), path.read_bytes())
    source = open_source(f"hfds/{tmp_path / 'hub'}", root=str(tmp_path / "cache"))
    check_named(source)
    monkeypatch.delattr("timm.data.readers.reader_hfds.ReaderHfds.iter_targets")  # as before timm 1.0.31
    check_named(open_source(f"hfds/{tmp_path / 'hub'}", root=str(tmp_path / "cache")))
    (tmp_path / "hub" / "train" / "cat" / "0.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"sample 0 of 'hfds/.*' cannot be read"):
        open_source(f"hfds/{tmp_path / 'hub'}", root=str(tmp_path / "cache2"))
