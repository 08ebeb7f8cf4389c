"""nab poison: the folder it writes gives back the poisoned pixels, and only truth.csv knows which they are."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nab_defense.bench.attacks import create
from nab_defense.bench.poison import poison_source, read_truth
from nab_defense.bench.trigger import load_trigger, prepared
from nab_defense.cli import poison as command
from nab_defense.data.sources import Source, open_source
from tests.digits_runs import write_images

BASE = ["digits", "--attack", "badnets", "--rate", "0.1", "--target", "3", "--limit", "300"]


def content(source: Source) -> list[tuple[bytes, int]]:
    return sorted((source.pixels(i).tobytes(), int(source.labels[i])) for i in range(len(source)))


def test_the_folder_holds_exactly_the_poisoned_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs" / "p"
    assert command.main([*BASE, "--out", str(out), "size=3", "pattern=white", "--seed", "4"]) == 0
    attack = create("badnets", size=3, pattern="white")
    expected, truth = poison_source(open_source("digits").limited(300, 4), attack, rate=0.1, target=3, seed=4)
    reopened = open_source(str(out))
    assert content(reopened) == content(expected)
    assert reopened.classes == expected.classes and reopened.mode == "L"
    back = read_truth(tmp_path / "runs" / "p.truth.csv", reopened)
    assert (back.target, back.mode, int(back.poisoned.sum())) == (3, "all_to_one", 30)
    flagged = sorted(reopened.pixels(i).tobytes() for i in np.flatnonzero(back.poisoned))
    assert flagged == sorted(expected.pixels(i).tobytes() for i in np.flatnonzero(truth.poisoned))
    assert sorted(back.true_labels) == sorted(truth.true_labels)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "300 images, 30 poisoned by badnets (target 3, number 3)" in lines[0] and "p.truth.csv" in lines[0]


def test_files_do_not_betray_the_poison(tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    for label in range(2):
        (clean / f"c{label}").mkdir(parents=True)
        for index in range(40):
            image = Image.fromarray(np.random.default_rng([label, index]).integers(0, 256, (12, 13, 3), dtype=np.uint8))
            image.save(clean / f"c{label}" / f"c{label}_{index}.png", icc_profile=b"a color profile", dpi=(72, 72))
    out = tmp_path / "p"
    command.main([str(clean), "--attack", "blend", "--rate", "0.2", "--target", "c1", "--out", str(out)])
    files = sorted(out.rglob("*.png"))
    assert [p.name for p in sorted(files, key=lambda p: p.name)] == [f"{i:02d}.png" for i in range(80)]
    assert len({os.stat(p).st_mtime for p in files}) == 1
    for path in files:
        with Image.open(path) as image:
            assert image.mode == "RGB" and not image.info
    assert {p.name for p in tmp_path.iterdir()} == {"clean", "p", "p.truth.csv"}
    # The numbers say nothing about the class an image came from.
    source = open_source(str(out))
    truth = read_truth(tmp_path / "p.truth.csv", source)
    numbers = np.array([int(Path(name).stem) for name in source.ids])
    for came_from in range(2):
        assert np.ptp(numbers[truth.true_labels == came_from]) > 60


def test_what_an_attack_learned_lies_beside_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p"
    quick = ["--rate", "0.03", "--target", "3", "--limit", "300", "--out", str(out), "epochs=1", "rounds=2"]
    assert command.main(["digits", "--attack", "narcissus", *quick]) == 0
    assert "what the attack learned in" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"p", "p.truth.csv", "p.trigger.safetensors"}
    attack = load_trigger(tmp_path / "p.trigger.safetensors", create("narcissus", epochs=1, rounds=2), target=3)
    reopened = open_source(str(out))
    flagged = {reopened.pixels(i).tobytes() for i in np.flatnonzero(read_truth(tmp_path / "p.truth.csv", reopened).poisoned)}
    clean = open_source("digits").limited(300, 0)
    assert len(flagged) == 9 and flagged <= {attack.apply(clean.pixels(i)[None], 0)[0].tobytes() for i in range(300)}


def test_several_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    triggers = "triggers=[badnets, {name: sig, target: 5, params: {frequency: 2}}]"
    line = ["digits", "--attack", "several", triggers, "--rate", "0.06", "--target", "3", "--out", str(tmp_path / "p")]
    assert command.main(line) == 0 and "86 poisoned by several (several targets)" in capsys.readouterr().out
    source = open_source(str(tmp_path / "p"))
    truth = read_truth(tmp_path / "p.truth.csv", source)
    assert set(source.labels[truth.poisoned]) == {3, 5} and (truth.target, truth.mode) == (None, "all_to_one")


def test_same_seed_same_files(tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        command.main([*BASE, "--out", str(tmp_path / name), "--seed", seed])
    a, b, c = ({p.relative_to(tmp_path / n).as_posix(): p.read_bytes() for p in (tmp_path / n).rglob("*.png")} for n in "abc")
    assert a == b and a != c


def test_all_to_all_counts_classes_as_the_folder_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = open_source("digits")
    renamed = replace(digits, classes=tuple(str(c) for c in (*range(10, 19), 9)))  # the last comes first
    monkeypatch.setattr(command, "open_source", lambda name, **_: renamed)
    command.main(["digits", "--attack", "badnets", "--rate", "0.2", "--mode", "all_to_all", "--out", str(tmp_path / "p")])
    source = open_source(str(tmp_path / "p"))
    assert source.classes == tuple(map(str, range(9, 19)))
    truth = read_truth(tmp_path / "p.truth.csv", source)
    np.testing.assert_array_equal(source.labels[truth.poisoned], (truth.true_labels[truth.poisoned] + 1) % 10)
    assert truth.mode == "all_to_all"
    names = np.array(renamed.classes)
    assert sorted(np.array(source.classes)[truth.true_labels]) == sorted(names[digits.labels])


def test_a_learned_trigger_is_of_the_class_that_the_folder_calls_so(tmp_path: Path) -> None:
    digits = open_source("digits").limited(60, 0)
    turned = replace(digits, classes=tuple(reversed(digits.classes)))
    attack = create("narcissus", epochs=1, rounds=1)
    ordered = command._as_folder_order(turned)
    assert ordered.classes == digits.classes and (ordered.labels == 9 - digits.labels).all()
    there, here = (prepared(attack, source, target=0, seed=0).tensors for source in (turned, ordered))
    assert any(not np.array_equal(there[name], here[name]) for name in there)
    assert command._as_folder_order(digits) is digits


def test_nothing_is_left_where_the_trigger_does_not_fit_on_a_later_image(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", each=9)
    for name in ("5.png", "6.png", "7.png", "8.png"):
        Image.open(images / "c1" / name).resize((2, 2)).save(images / "c1" / name)
    with pytest.raises(ValueError, match="does not fit on a 2x2 image"):
        command.main([str(images), "--attack", "badnets", "--rate", "0.4", "--target", "c0", "--out", str(tmp_path / "p")])
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_settings_of_the_data(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", each=6)
    (images / "c0" / "broken.png").write_bytes(b"")
    command_line = ["--attack", "badnets", "--rate", "0.2", "--target", "c1", "size=2", "--out"]
    with pytest.raises(ValueError, match=r"leave them out with data\.strict=false"):
        command.main([str(images), *command_line, str(tmp_path / "p")])
    assert command.main([str(images), *command_line, str(tmp_path / "p"), "data.strict=false"]) == 0
    assert len(open_source(str(tmp_path / "p"))) == 12
    (images / "c0" / "broken.png").unlink()
    by_timm = ["torch/image_folder", f"data.options.root={images}"]
    assert command.main([*by_timm, *command_line, str(tmp_path / "q")]) == 0
    assert content(open_source(str(tmp_path / "q"))) == content(open_source(str(tmp_path / "p")))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--target", "11"], "no class '11'; known: 0, 1, .* or 0..9"),
        (["--attack", "badnet"], "did you mean 'badnets'"),
        (["sise=3"], "did you mean 'size'"),
        (["size"], "'size' is not a setting; write key=value"),
        (["size=[3"], "not valid YAML"),
        (["--rate", "1.5"], r"rate must be in \(0, 1\), got 1.5"),
        (["--rate", "0.99"], "the largest possible is"),
        (["--mode", "all_to_al"], "did you mean 'all_to_all'"),
        (["data.limit=5"], "'data.limit=5' cannot be set here; known: data.strict, data.options"),
        (["data.strict=5"], "poison settings: data.strict=5"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--limit", "12"], "would be left without images"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(tmp_path: Path, extra: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command.main([*BASE, "--out", str(tmp_path / "p"), *extra])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not an empty folder"):
        command.main([*BASE, "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="is not an empty folder"):
        command.main([*BASE, "--out", str(tmp_path / "kept.txt")])
    (tmp_path / "empty").mkdir()
    assert command.main([*BASE, "--out", str(tmp_path / "empty")]) == 0
