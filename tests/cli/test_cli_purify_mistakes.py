"""nab purify: wrong input ends with exit status 2 and one line; nothing is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nab_defense import checkpoint, open_source
from nab_defense.checkpoint import Network
from tests.digits_runs import Mistakes, write_images

NETS = "from torch import nn\n\ndef linear():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
NETS += "\nclass Two(nn.Sequential):\n    def forward(self, images):\n        return super().forward(images), None\n"
NETS += "\ndef two():\n    return Two(nn.Flatten(), nn.Linear(64, 10))\n"
OPEN = ["--mean", "0.3", "--std", "0.4", "--input-size", "8"]
QUICK = ["--method", "ibau", "augment=false", "runtime.threads=1"]


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def fitted(folder: Path, *, shift: int = 0, swapped: bool = False) -> nn.Module:
    """One that knows the images of a folder; with a shift by the labels of other classes, swapped two of them by each other's."""
    source, network = open_source(str(folder)), linear()
    images = np.stack([np.asarray(source.load(i)) for i in range(len(source))])
    labels = torch.from_numpy(source.labels + shift) % 10
    labels = torch.tensor([0, 1, 3, 2, *range(4, 10)])[labels] if swapped else labels
    flat = (torch.from_numpy(images).float().flatten(1) / 255 - 0.3) / 0.4
    weights = torch.linalg.lstsq(torch.cat([flat, torch.ones(len(flat), 1)], 1), torch.eye(10)[labels], driver="gelsd").solution
    network.load_state_dict({"1.weight": weights[:-1].T.contiguous(), "1.bias": weights[-1]})
    return network


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mistaken_nets.py").write_text(NETS)
    write_images(tmp_path / "clean", classes=10, each=6, mode="L")
    torch.save({"net": fitted(tmp_path / "clean").state_dict()}, tmp_path / "bad.pth")
    torch.save({"net": fitted(tmp_path / "clean", shift=1).state_dict()}, tmp_path / "shifted.pth")
    torch.save({"net": fitted(tmp_path / "clean", swapped=True).state_dict()}, tmp_path / "swapped.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mistakes(place: Path, capsys: pytest.CaptureFixture[str]) -> Mistakes:
    made = Mistakes(place, capsys)
    (made.out / "suspects.csv").unlink()  # which would be refused itself
    return made


RUN = ("purify", "--model", "mistaken_nets:linear", "--checkpoint", "bad.pth", *OPEN, "--clean", "clean", *QUICK)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--method", "ibua"], ("no purifier 'ibua'", "did you mean 'ibau'?")),
        (["round=3"], ("no setting 'round'; ibau has: steps", "did you mean 'rounds'?")),
        (["clean_limt=3"], ("no setting 'clean_limt'", "did you mean 'clean_limit'?")),
        (["rounds=many"], ("rounds must be int, got 'many'",)),
        (["clean_limit=0"], ("clean_limit must be a whole number of at least 1, got 0",)),
        (["holdout=1.5"], ("holdout must be in (0, 1)",)),
        (["max_drop=x"], ("max_drop must be a number of at least 0, got 'x'",)),
        (["runtime.thread=1"], ("no setting 'runtime.thread'", "did you mean 'runtime.threads'?")),
        (["seed=-1"], ("seed=-1",)),
        (["clean_limit=23"], ("13 clean images are left to fit on", "ibau needs 20")),
        (["clean_limit=12"], ("has 1 clean images; each of the 10 needs two",)),
        (["--unlabeled"], ("ibau needs the labels of the clean images",)),
        (["--clean", "IMAGES"], ("has 2 classes, 'c0' to 'c1'; the model tells 10 apart; add the 8 missing, each with images",)),
        (["--clean", "IMAGES"], ("folder of its own, or use --unlabeled with --method clp or distill",)),
        (["--clean", "FLAT"], ("flat has no sub-folders; expected one for each class",)),
        (["--clean", "nowhere"], ("no such folder or data set: nowhere",)),
        (["--std", "0"], ("std must be positive",)),
        (["--std", "0.1,0.1"], ("std has 2 values, the images have 1 channels",)),
        (["--mean", "a"], ("--mean", "invalid numbers value: 'a'")),
        (["--mean", "0,0,0", "--std", "1,1,1"], ("the model cannot take 3x8x8 images",)),
        (["--input-size", "9"], ("the model cannot take 1x9x9 images",)),
        (["--input-size", "-5"], ("--input-size must be at least 1, got -5",)),
        (["--mean", "nan"], ("mean must be finite, got [nan]",)),
        (["hflip=7"], ("hflip must be at most 1, got 7",)),
        (["hflip=.nan"], ("hflip must be a number of at least 0, got nan",)),
        (["--method", "ft_sam", "smoothing=2"], ("smoothing must be in [0, 1), got 2",)),
        (["--method", "distill", "first=.nan"], ("first must be in [0, 1], got nan",)),
        (["lr=-1"], ("lr must be above 0, got -1",)),
        (["--method", "polarizer", "lr=-1"], ("lr must be above 0, got -1",)),
        (["--method", "polarizer", "fraction=3"], ("fraction must be in (0, 1), got 3",)),
        (["--method", "finetune", "momentum=-1"], ("momentum must be in [0, 1), got -1",)),
        (["terms=0"], ("terms must be at least 1, got 0",)),
        (["--clean", "mistaken_nets.py"], ("mistaken_nets.py is a file, expected a folder",)),
        (["--test", "nowhere"], ("no such folder or data set: nowhere",)),
        (["--test", "clean", "--attack", "badnets", "--target", "77"], ("target must be a class in 0..9, got 77",)),
        (["--model", "mistaken_nets:two"], ("it gives tuple; wrap it so that it gives logits alone",)),
        (["--num-classes", "7"], ("--num-classes says 7, the model gives 10",)),
        (["--model", "mistaken_nets:linaer"], ("'mistaken_nets:linaer' gives no network: AttributeError",)),
        (["--model", "no_such_nets:linear"], ("gives no network: ModuleNotFoundError",)),
        (["--model", "resnet81"], ("timm has no model 'resnet81'", "did you mean 'resnet")),
        (["--model", "test_resnet"], ("bad.pth does not fit the network: it lacks", "has unknown")),
        (["--checkpoint", "bda.pth"], ("no such file: bda.pth",)),
        (["--checkpoint", "bad.safetensors"], ("no such file: bad.safetensors",)),
        (["--checkpoint", "shifted.pth"], ("names 0.00 of the 60 clean images rightly", "check the order of classes, --mean")),
        (["--checkpoint", "swapped.pth"], ("1.00 in another order: class 'c2', number 2 here, is its output 3; name",)),
        (["--checkpoint", "module.pth"], ("module.pth cannot be read as weights: it holds torch.nn.modules",)),
        (["--checkpoint", "nan.pth"], ("1.weight holds values that are not finite",)),
        (["--checkpoint", "wide.pth"], ("1.weight is (10, 65) in the file, (10, 64) in the network",)),
        (["--rank", "clean"], ("--rank ranks by the network that rnp has unlearn", "choose --method rnp")),
        (["--rank", "IMAGES", "--method", "rnp"], ("images has other classes than", "missing: ['c2', 'c3', 'c4']")),
        (["--test", "clean"], ("--test clean has the images of --clean, by which the model is repaired",)),
        (["--attack", "badnets"], ("--attack measures on test images; add --test",)),
        (["--test", "clean", "attack.size=3"], ("attack.size sets an attack; name it with --attack",)),
        (["--test", "clean", "--attack", "badnet"], ("no attack 'badnet'", "did you mean 'badnets'?")),
        (["--test", "clean", "--attack", "badnets", "attack.sise=3"], ("no setting 'sise'", "did you mean 'size'?")),
        (["--out", "held"], ("held holds a trained model and its results",)),
        (["--out", "begun"], ("holds an interrupted repair; go on with --resume",)),
        (["--out", "ranked"], ("ranked holds the suspects.csv of an earlier run; name another --out",)),
        (["--suspects", "accused.csv"], ("--suspects and --training go together",)),
        (
            ["--suspects", "accused.csv", "--training", "clean"],
            ("accused.csv names 1 images that clean lacks, first 'c0/99.png'",),
        ),
        (["--suspects", "spared.csv", "--training", "clean"], ("spared.csv gives no image another label",)),
        (["--suspects", "no.csv", "--training", "clean"], ("no such file: no.csv",)),
        (["runtime.compile=true"], ("no setting 'runtime.compile'",)),
    ],
)
def test_mistake(extra: list[str], says: tuple[str, ...], place: Path, mistakes: Mistakes) -> None:
    state = linear().state_dict()
    torch.save(linear(), place / "module.pth")
    torch.save({**state, "1.weight": state["1.weight"] * torch.nan}, place / "nan.pth")
    torch.save({**state, "1.weight": torch.zeros(10, 65)}, place / "wide.pth")
    write_images(place / "images", each=20, mode="L")
    (place / "flat").mkdir()
    (place / "images" / "c0" / "0.png").rename(place / "flat" / "0.png")
    for earlier in ("held/model.safetensors", "begun/unfinished/key.json", "ranked/suspects.csv"):
        (place / earlier).parent.mkdir(parents=True)
        (place / earlier).write_bytes(b"{}")
    for name, proposed in (("accused", "c1"), ("spared", "c0")):
        row = f"id,label,proposed,score,action,evidence\nc0/99.png,c0,{proposed},1,kept,x\n"
        (place / f"{name}.csv").write_text(row)
    places = {"IMAGES": "images", "FLAT": "flat"}
    mistakes(*RUN, "--out", "out", *(places.get(word, word) for word in extra), says=says)
    assert not (place / "out" / "unfinished").exists()  # nothing was begun


def test_mistakes_with_a_model_of_this_package(place: Path, mistakes: Mistakes) -> None:
    network = Network("test_resnet", 10, 1)
    facts = {"classes": ["a", *(f"c{k}" for k in range(1, 10))], "input_size": 8}
    checkpoint.save(place / "run" / "model.safetensors", network.build(), network, mean=(0.3,), std=(0.4,), **facts)
    rest = ("--clean", "clean", *QUICK)
    mistakes(
        "purify",
        "--checkpoint",
        "run",
        *rest,
        says=("clean has other classes than those", "only there: ['c0']", "missing: ['a']"),
    )
    fewer = write_images(place / "fewer", classes=9, each=6, mode="L")
    line = mistakes("purify", "--checkpoint", "run", "--clean", fewer, *QUICK, says=("9 and not 10", "; add the 1 missing, each"))
    assert line.endswith("or use --unlabeled with --method clp or distill")
    line = mistakes("evaluate", "run", "--data", fewer, says=("; add the 1 missing, each with images in a folder of its own",))
    assert "--unlabeled" not in line
    mistakes("purify", "--checkpoint", "run", "--std", "1", *rest, says=("run says std = (0.4,); leave out --std",))
    mistakes("purify", "--checkpoint", "run", "--model", "resnet18", *rest, says=("saved with model 'test_resnet'",))
    mistakes("purify", "--checkpoint", "bad.pth", *rest, says=("does not say how its network is built; add --model",))
    own = ("purify", "--checkpoint", "bad.pth", "--model", "mistaken_nets:linear", *rest)
    bare = {"model." + name: tensor for name, tensor in linear().state_dict().items()}
    torch.save({**bare, "norm.mean": torch.full((1, 3, 1, 1), 0.25), "norm.std": torch.ones(3)}, place / "normed.pth")
    normed = ("purify", "--checkpoint", "normed.pth", "--model", "mistaken_nets:linear", *rest)
    mistakes(*normed, says=("normed.pth holds norm.mean, by which its network normalises its input: add --mean 0.25,0.25,0.25",))
    mistakes(*normed, "--mean", "0.3", says=("holds norm.std", "add --std 1,1,1"))
    checkpoint.save(place / "bare" / "model.safetensors", network.build(), network, mean=(0.3,), std=(0.4,))
    mistakes("evaluate", "bare", "--data", "clean", says=("does not tell the model's classes and input_size; give them to",))
    mistakes(*own, "--mean", "0.3", says=("nothing says the std of this network's input; add --std",))
