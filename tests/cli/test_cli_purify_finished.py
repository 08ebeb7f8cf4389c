"""nab purify --resume where the run had ended: it says so, with what that said and its exit status, and does nothing again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nab_defense.cli import main
from tests.cli.test_cli_purify_mistakes import NETS, OPEN, fitted
from tests.digits_runs import contents, write_images

RUN = ["purify", "--model", "finished_nets:linear", "--checkpoint", "bad.pth", *OPEN, "--clean", "clean", "--out", "out"]
QUICK = ["runtime.threads=1", "augment=false", "steps=3"]
AGAIN = "it was finished already, in out"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "finished_nets.py").write_text(NETS)
    write_images(tmp_path / "clean", classes=10, each=15, mode="L")
    write_images(tmp_path / "tests", classes=10, each=14, mode="L")
    torch.save({"net": fitted(tmp_path / "clean").state_dict()}, tmp_path / "bad.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def purified(*extra: str) -> int:
    return main([*RUN, "--method", "ibau", *QUICK, "max_drop=0.9", *extra])


def test_it_says_what_it_said_and_does_nothing_again(place: Path, lenient: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert purified("--test", "tests") == 0
    before, shown = contents(place), capsys.readouterr().out.splitlines()
    assert purified("--test", "tests", "--resume") == 0
    assert capsys.readouterr().out.splitlines() == [*shown[:-1], AGAIN] and contents(place) == before
    (place / "out" / "model.safetensors").unlink()  # without which it is not finished
    assert purified("--test", "tests", "--resume") == 0
    assert AGAIN not in capsys.readouterr().out and "out/model.safetensors" in contents(place)


def test_a_rejection_keeps_its_status(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [purified("lr=1e-8"), purified("lr=1e-8", "--resume")] == [3, 3]
    assert capsys.readouterr().out.splitlines()[-1] == AGAIN


def test_other_settings_are_refused(place: Path, lenient: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert purified() == 0
    before = contents(place)
    for other, differs in [
        (["lr=0.2"], "knobs"),
        (["runtime.precision=bfloat16"], "runtime"),
        (["--test", "tests"], "test"),
        (["hflip=0.0"], "hflip"),
        (["--std", "0.5"], "input"),
        (["--unlabeled", "--method", "distill"], "method, knobs, data"),
    ]:
        capsys.readouterr()
        assert purified(*other, "--resume") == 2
        says = f"error: out holds a repair with another {differs}; set it back, or name another --out\n"
        assert capsys.readouterr().err == says
    torch.save({"net": fitted(place / "clean", shift=1).state_dict()}, place / "bad.pth")
    assert purified("--resume") == 2 and "with another checkpoint;" in capsys.readouterr().err
    assert purified() == 2 and "out holds a trained model and its results" in capsys.readouterr().err
    assert {name: bytes_ for name, bytes_ in contents(place).items() if name != "bad.pth"} == {
        name: bytes_ for name, bytes_ in before.items() if name != "bad.pth"
    }
