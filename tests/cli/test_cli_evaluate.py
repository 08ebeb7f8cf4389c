"""nab evaluate: the numbers that training reported come back, from a run's folder and from its file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nab_defense import registry, session
from nab_defense.cli import main
from nab_defense.data import open_source
from tests.digits_runs import contents, write_images, write_recipe

ATTACK = ["--data", "digits", "--limit", "60", "--attack", "blend", "alpha=0.3", "--target", "0"]


@pytest.fixture
def copied(blend_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(blend_run, tmp_path / "run"))


def measured(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text()))


def test_a_run(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, reported = contents(copied), measured(copied)
    assert main(["evaluate", str(copied), *ATTACK]) == 0
    found = measured(copied / "evaluation")
    assert found["models"] == {"defended": reported["models"]["defended"]}
    assert found["verdict"] == reported["verdict"]
    assert found["attack"]["name"] == "blend" and found["attack"]["params"] == {"alpha": 0.3}
    after = contents(copied)
    assert {name: after[name] for name in before} == before
    shown = capsys.readouterr().out
    assert "defended, stamped" in shown and "defended, plain" in shown and "evaluation" in shown
    assert "     ACC     ASR      RA    ASR*\n" in shown and "\nASR*: " in shown
    stamped, retuned = found["models"]["defended"]["asr"], found["models"]["defended"]["retuned"]
    assert retuned["n"] == stamped["n"] - 20 and f"{retuned['value']:.4f}" in shown


def test_its_file(copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere"
    assert main(["evaluate", str(copied / "model.safetensors"), *ATTACK, "--out", str(out)]) == 0
    assert measured(out)["models"]["defended"] == measured(copied)["models"]["defended"]
    assert not (copied / "evaluation").exists()


def test_without_an_attack(copied: Path) -> None:
    assert main(["evaluate", str(copied), "--data", "digits", "--limit", "60"]) == 0
    model = measured(copied / "evaluation")["models"]["defended"]
    assert set(model) == {"acc", "plain"} and model["acc"] == measured(copied)["models"]["defended"]["acc"]


def test_a_model_without_a_stamp(tmp_path: Path) -> None:
    assert main(["train", str(write_recipe(tmp_path)), "--out", str(tmp_path / "run")]) == 3  # one epoch learns nothing
    assert main(["evaluate", str(tmp_path / "run"), "--data", "digits", "--limit", "60"]) == 0
    models = measured(tmp_path / "run" / "evaluation")["models"]
    assert models == {"model": {"acc": measured(tmp_path / "run")["models"]["defended"]["acc"]}}


def test_a_learned_trigger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run leaves its trigger, and measuring with that file gives the run's own ASR."""
    run, quick = tmp_path / "run", ["epochs=1", "rounds=2"]
    attack = {"name": "narcissus", "rate": 0.05, "params": {"epochs": 1, "rounds": 2}}
    assert main(["train", str(write_recipe(tmp_path, attack=attack)), "--out", str(run)]) in (0, 3)
    trigger = ["--attack", "narcissus", "--trigger", str(run / "trigger.safetensors")]
    line = ["evaluate", str(run), "--data", "digits", "--limit", "60"]
    assert main([*line, *trigger, *quick]) == 0
    reported, found = measured(run)["models"]["defended"], measured(run / "evaluation")["models"]
    assert next(iter(found.values()))["asr"] == reported["asr"]
    capsys.readouterr()
    for extra, message in (
        (["--attack", "narcissus", *quick], "needs the file that poisoning left: give it with --trigger FILE"),
        ([*trigger, "epochs=2"], "holds a trigger of attack Narcissus("),
        ([*trigger, *quick, "--target", "1"], "holds a trigger of target 0, and 1 is asked for"),
        (["--attack", "blend", *trigger[2:]], "learns no trigger"),
        (trigger[2:], "sets an attack; name it with --attack"),
    ):
        assert main([*line, *extra]) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1


def digits_folder(folder: Path) -> Path:
    """Three test images of each digit, and a file that is no image."""
    source = open_source("digits", split="test")
    for label, name in enumerate(source.classes):
        (folder / name).mkdir(parents=True)
        for index in (source.labels == label).nonzero()[0][:3]:
            source.image(index).save(folder / name / f"{index}.png")
    (folder / "0" / "broken.png").write_bytes(b"")
    return folder


def test_a_folder_is_read_once_and_as_the_settings_say(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[dict[str, Any]] = []

    def watched(name: str, **options: Any) -> Any:
        opened.append(options)
        return open_source(name, **options)

    monkeypatch.setattr(session, "open_source", watched)
    folder = digits_folder(tmp_path / "images")
    assert main(["evaluate", str(copied), "--data", str(folder), "data.strict=false", "--attack", "blend", "alpha=0.3"]) == 0
    assert opened == [{"split": "test", "channels": 1, "strict": False}]
    model = measured(copied / "evaluation")["models"]["defended"]
    assert (model["acc"]["n"], model["asr"]["n"]) == (30, 27)
    assert main(["evaluate", str(copied), "--data", "digits", "data.test_split=train", "--limit", "99"]) == 0
    assert opened[1:] == [{"split": "train", "channels": 1, "strict": True}]


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (("a", "c"), "only there: ['b'], missing: ['c']"),
        (("a", "b", "c"), "2 and not 3, only there: [], missing: ['c']"),
        (("b", "a"), "the same 2 names in another order, number 0 is 'a' and should be 'b'"),
    ],
)
def test_a_difference_between_classes_is_named(theirs: tuple[str, ...], words: str) -> None:
    assert registry.difference(("a", "b"), theirs) == words


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--data", "digits", "--limit", "0"], "--limit must be at least 1, got 0"),
        (["--data", "nowhere"], "no such folder or data set: nowhere"),
        (["--data", "IMAGES"], "only there: ['c0', 'c1'], missing: ['0', '1', '2']"),
        (["--data", "IMAGES"], "has other classes than those the model was trained on: 2 and not 10"),
        (["--data", "BROKEN"], "leave them out with data.strict=false"),
        (["--data", "digits", "data.limit=5"], "'data.limit=5' cannot be set here; known: data.strict"),
        (["--data", "digits", "data.strictt=0"], "did you mean 'data.strict'?"),
        (["--data", "digits", "data.strict=maybe"], "evaluation settings: data.strict='maybe'"),
        (["--data", "digits", "--attack", "blend", "--target", "10"], "target must be a class in 0..9, got 10"),
        (["--data", "digits", "--attack", "sig", "--mode", "all_to_all"], "use mode all_to_one"),
        (["--data", "digits", "--mode", "all_to_al"], "invalid choice: 'all_to_al'"),
        (["--data", "digits", "--out", "RUN"], "holds a trained model and its results"),
    ],
)
def test_mistakes(extra: list[str], message: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "images", mode="L")
    broken = write_images(tmp_path / "broken", classes=10, mode="L")
    (broken / "c0" / "0.png").write_bytes(b"")
    before = contents(tmp_path)
    places = {"IMAGES": str(images), "RUN": str(copied), "BROKEN": str(broken)}
    try:
        status = main(["evaluate", str(copied), *(places.get(word, word) for word in extra)])
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr().err
    assert status == 2 and message in said and len(said.splitlines()) == 1
    assert contents(tmp_path) == before
