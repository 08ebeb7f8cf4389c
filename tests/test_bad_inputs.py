"""Wrong input ends with exit status 2 and one line that says what, where and how to mend it; nothing is lost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch

from nab_defense import checkpoint, io
from nab_defense.cli import main
from nab_defense.cli.common import guarded
from tests.digits_runs import ROOT, Mistakes, contents, write_images, write_recipe


def test_recipe_that_cannot_be_read(tmp_path: Path, mistakes: Mistakes) -> None:
    recipe = write_recipe(tmp_path)
    mistakes.train(tmp_path / "tyni.yaml", says=("no such recipe", "did you mean 'tiny.yaml'?"))
    mistakes.train(tmp_path / "no" / "such.yaml", says=("no such file", "such.yaml"))
    mistakes.train(tmp_path, says=("is a folder, expected a file",))
    broken = {"data: [": "not valid YAML", "- a\n- b": "holds list, expected keys such as data", "": "holds NoneType"}
    for text, message in {**broken, "data: {source: digits": "line 1"}.items():
        recipe.write_text(text)
        mistakes.train(recipe, says=("tiny.yaml", message))
    recipe.write_bytes(b"\xff\xfe\x00")
    mistakes.train(recipe, says=("is not a text file",))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("train.epoch=3", ("no key 'train.epoch'", "known here: epochs", "did you mean 'epochs'?")),
        ("epochs=3", ("no key 'epochs'", "did you mean 'train.epochs'?")),
        ("train.epochs=abc", ("train.epochs='abc'", "valid integer")),
        ("attack.rate=2", ("'attack.name' is missing",)),
        ("data.limit=0", ("data.limit=0", "greater than or equal to 1")),
        ("train.mixup=0.2", ("mixup cannot be used", "after the stamp")),
        ("cutmix=1", ("cutmix cannot be used", "stamp")),
        ("train.reprob=0.25", ("reprob cannot be used", "use train.erase (and train.augment=crop_flip)")),
        ("train.erase=1.5", ("train.erase=1.5", "less than or equal to 1")),
        ("train={augment: timm, color_jitter: 0.4}", ("train.color_jitter=0.4: goes with train.augment=crop_flip",)),
        ("train.epochs", ("'train.epochs' is not a setting", "key=value", "train.epochs=12")),
        ("train.epochs=[3", ("'train.epochs=[3'", "not valid YAML")),
        ("data.source.x=3", ("data.source={'name': 'digits', 'x': 3}", "valid string")),
        ("data.source=digit", ("no such folder or data set: digit",)),
        ("model.name=resnet81", ("timm has no model 'resnet81'", "did you mean 'resnet")),
        ("model.in_chans=3", ("all images in digits are grey", "set model.in_chans=1")),
        ("model.kwargs.chanels=[8]", ("timm cannot build 'resnet10t'", "chanels")),
        ("scan.detector=spectrl", ("no detector 'spectrl'", "known: activation_clustering", "did you mean 'spectral'?")),
        ("scan.params.rank=2", ("detector 'lga' has no setting 'rank'",)),
        ("relabel.name=nearest", ("no relabeler 'nearest'", "did you mean 'nearest_center'?")),
        ("relabel.params.epoch=2", ("relabeler 'unlearned' has no setting 'epoch'", "did you mean 'epochs'?")),
        ("relabel.params.epochs=0", ("epochs must be at least 1, got 0",)),
        ("relabel.params.lr=fast", ("lr must be float, got 'fast'",)),
        ("relabel.params.model=resnet18", ("has no setting 'model'",)),
        ("relabel.name=trusted", ("'epochs'",)),
        ("relabel={name: trusted}", ("needs relabel.trusted", "folder of verified images")),
        ("relabel.trusted=nowhere", ("only relabel.name=trusted reads relabel.trusted", "drop one")),
        ("relabel.encoder={name: resnet10t}", ("uses the scan's network", "drop relabel.encoder")),
        ("relabel={name: trusted, trusted: nowhere}", ("no such folder or data set: nowhere",)),
        ("relabel={name: knn, encoder: {name: resnet10t, in_chans: 3}}", ("relabel.encoder.in_chans=3", "must agree")),
        ("scan.model={name: resnet10t}", ("scan.model.in_chans=3 and model.in_chans=1 must agree",)),
        ("scan.model={name: resnet81, in_chans: 1}", ("timm has no model 'resnet81'", "did you mean 'resnet")),
        ("attack=bled", ("no attack 'bled'", "did you mean 'blend'?")),
        ("attack={name: blend, rate: 2}", ("attack.rate=2", "less than 1")),
        ("attack={name: blend, params: {alfa: 1}}", ("attack 'blend' has no setting 'alfa'", "did you mean 'alpha'?")),
        ("attack={name: blend, alpha: 0.1}", ("no key 'attack.alpha'", "'attack.params.alpha'")),
        ("attack={name: badnets, target: 12}", ("target must be a class in 0..9, got 12",)),
        ("stamp.corner=middle", ("stamp corner must be one of top_left", "got 'middle'")),
        ("stamp.value=red", ("stamp.value='red'", "'mean' or 'noise'")),
        ("stamp.size=9", ("a 9 px stamp does not fit on a 8x8 image",)),
        ("data.mean=[0.3,0.3,0.3]", ("data.mean has 3 values", "1 channels")),
        ("data.std=null", ("data.mean and data.std go together",)),
        ("data.options.split=val", ("data.options={'split': 'val'}", "split cannot be an option", "data.test_split")),
        ("data.options={root: x, strict: true}", ("strict cannot be an option", "data.strict")),
        ("data.options.labelled=false", ("labelled cannot be an option", "purify.labelled")),
        ("data.std=[0.0]", ("data.std must be positive",)),
        ("train.opt=sdg", ("timm has no optimizer 'sdg'", "did you mean 'sgd'?")),
        ("train.sched=step", ("after epoch 90 of 1: set decay_epochs",)),
        ("train.sched=cosin", ("sched must be one of cosine",)),
        ("runtime.device=gpu", ("device 'gpu' is not a device; use auto, cpu or cuda",)),
        ("baselines=[oracle]", ("oracle", "data.truth")),
        ("data.limit=1", ("1 training image, two are the least", "data.limit")),
    ],
)
def test_setting(setting: str, says: tuple[str, ...], tmp_path: Path, mistakes: Mistakes) -> None:
    mistakes.train(write_recipe(tmp_path), setting, says=says)


def test_network_that_cannot_serve(tmp_path: Path, mistakes: Mistakes) -> None:
    recipe = write_recipe(tmp_path)
    vit = "model={name: vit_tiny_patch16_224, in_chans: 1, small_stem: true}"
    mistakes.train(recipe, vit, says=("small_stem serves timm's ResNet family, not 'vit_tiny_patch16_224'", "unset it"))
    vit = "model={name: vit_tiny_patch16_224, in_chans: 1, kwargs: {depth: 1}}"
    mistakes.train(recipe, vit, says=("'vit_tiny_patch16_224' cannot take 1x8x8 images", "224", "set data.size"))
    mistakes.train(recipe, "model={name: alexnet, in_chans: 1}", says=("timm has no model 'alexnet'",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda(tmp_path: Path, mistakes: Mistakes) -> None:
    mistakes.train(write_recipe(tmp_path), "runtime.device=cuda", says=("'cuda' asked for", "no CUDA device", "use device=cpu"))


def folder_recipe(tmp_path: Path, **data: Any) -> Path:
    return write_recipe(tmp_path, data={"source": str(tmp_path / "data"), "test": None, "limit": None, **data})


def test_folder_without_what_training_needs(tmp_path: Path, mistakes: Mistakes) -> None:
    images, recipe = write_images(tmp_path / "data"), folder_recipe(tmp_path)
    mistakes.train(recipe, f"data.source={tmp_path / 'dta'}", says=("no such folder or data set", "did you mean 'data'?"))
    mistakes.train(recipe, f"data.source={images / 'c0'}", says=("c0 has no sub-folders", "one for each class"))
    mistakes.train(recipe, f"data.source={recipe}", says=("is a file, expected a folder",))
    one = write_images(tmp_path / "one", classes=1, each=1)
    mistakes.train(recipe, f"data.source={one}", says=("has one class ('c0')", "at least two"))
    (images / "c2").mkdir()
    mistakes.train(
        recipe, says=("class 'c2'", "has no readable image", "fill it, or remove it if a model without it is to be trained")
    )
    (images / "c2" / "0.txt").write_text("no image")
    mistakes.train(recipe, says=("class 'c2'",))


def test_files_that_are_no_images(tmp_path: Path, mistakes: Mistakes) -> None:
    images, recipe = write_images(tmp_path / "data"), folder_recipe(tmp_path)
    whole = (images / "c0" / "0.png").read_bytes()
    (images / "c0" / "0.png").write_bytes(whole[: len(whole) // 2])
    (images / "c1" / "2.png").write_bytes(b"")
    says = ("2 of 6 files", "c0/0.png (truncated)", "c1/2.png (zero-byte)", "data.strict=false")
    mistakes.train(recipe, says=says)
    mistakes("scan", images, "--out", mistakes.out, says=says)
    assert main(["scan", str(images), "--out", str(tmp_path / "scan"), "data.strict=false", "scan.epochs=1"]) == 0
    for path in (images / "c1").iterdir():
        path.write_bytes(b"no image")
    mistakes.train(recipe, "data.strict=false", says=("class 'c1'", "has no readable image"))


def test_grey_images_for_a_color_network(tmp_path: Path, mistakes: Mistakes) -> None:
    write_images(tmp_path / "data", mode="L")
    color = "model={name: resnet10t, small_stem: true}"
    says = ("are grey", "takes 3 channels", "set model.in_chans=1")
    mistakes.train(folder_recipe(tmp_path, mean=None, std=None), color, says=says)


def test_the_smallest_data_that_can_be_trained_on(tmp_path: Path) -> None:
    write_images(tmp_path / "data", each=1, mode="L")
    recipe = str(folder_recipe(tmp_path))
    assert main(["train", recipe, "train.batch_size=4096", "--out", str(tmp_path / "run")]) == 3  # two images teach nothing
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_test_set_and_truth_that_do_not_match(tmp_path: Path, mistakes: Mistakes) -> None:
    write_images(tmp_path / "data", mode="L")
    other = write_images(tmp_path / "other", classes=3, mode="L")
    recipe = folder_recipe(tmp_path)
    mistakes.train(recipe, f"data.test={other}", says=("has other classes than", "only there: ['c2']"))
    mistakes.train(recipe, "data.test=nowhere", says=("no such folder or data set: nowhere",))
    truth = tmp_path / "truth.csv"
    mistakes.train(recipe, f"data.truth={truth}", says=("no such file", "truth.csv"))
    rows = [f"c{label}/{index}.png,0,c{label},c{label}" for label in range(2) for index in range(3)]
    for text, says in [
        ("id,poisoned\n", ("has no column 'true_label'",)),
        ("id,poisoned,true_label,label\n" + "\n".join(rows[1:]), ("lacks 1 of the 6 ids", "c0/0.png")),
        ("id,poisoned,true_label,label\n" + "\n".join([*rows, "c1/9.png,0,c1,c1"]), ("has 1 ids that", "c1/9.png")),
        ("id,poisoned,true_label,label\n" + "\n".join([*rows[1:], "c0/0.png,0,c1,c1"]), ("the label 'c1'", "has 'c0'")),
    ]:
        truth.write_text(text)
        mistakes.train(recipe, f"data.truth={truth}", says=("truth.csv", *says))
    mistakes.train(recipe, f"data.truth={truth}", "attack=badnets", says=("data.truth", "attack.poison=false"))


def test_loss_that_is_not_finite(tmp_path: Path, mistakes: Mistakes) -> None:
    recipe = write_recipe(tmp_path)
    mistakes.train(recipe, "train.lr=1e6", "train.epochs=3", says=("defended: the loss is", "lower lr (now 1000000.0)"))
    mistakes.train(recipe, "scan.lr=1e9", "scan.epochs=3", says=("scan", "lower"))


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "stages/defended.state")


class FullStream(FileIO):
    """Takes a little, then the disk is full."""

    room = 20_000

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            full_disk()
        return super().write(data)


def test_full_disk(tmp_path: Path, mistakes: Mistakes, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(io.os, "replace", full_disk)
        mistakes.train(recipe, says=("the disk is full; make room", "Finished files are intact"))
    with monkeypatch.context() as patched:  # inside torch.save, which hides the cause in an error of its own
        patched.setattr(io.os, "fdopen", FullStream)
        mistakes.train(recipe, says=("the disk is full; make room",))
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.io, "save_tensors", full_disk)
        mistakes.train(recipe, says=("the disk is full; make room",))
    assert main(["train", str(recipe), "--resume", "--out", str(mistakes.out)]) == 3  # done; one epoch learns nothing


def test_out_that_cannot_be_written(tmp_path: Path, mistakes: Mistakes, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, file = write_recipe(tmp_path), tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below" / "it"):
        mistakes("train", recipe, "--out", out, says=("cannot write to", "file is a file", "name another"))
        mistakes("scan", "digits", "--out", out, says=("file is a file",))
        mistakes("evaluate", file, "--data", "digits", "--out", out, says=("file is a file",))
    poison = ("poison", "digits", "--attack", "badnets", "--rate", "0.1", "--target", "0", "--out")
    mistakes(*poison, file / "below", says=("file is a file",))
    mistakes(*poison, file, says=("exists and is not an empty folder",))
    monkeypatch.setattr(io.os, "access", lambda path, mode: False)  # root may write anywhere
    mistakes.train(recipe, says=("no permission to write in", "name another"))


def test_resume_in_the_folder_of_another_recipe(tmp_path: Path, mistakes: Mistakes) -> None:
    recipe = write_recipe(tmp_path)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint.io, "save_tensors", full_disk)
        mistakes.train(recipe, says=("the disk is full",))
    mistakes.train(recipe, "--resume", "train.lr=0.01", "seed=3", says=("another seed, train;", "leave out --resume"))
    (mistakes.out / "stages" / "recipe.yaml").unlink()
    mistakes.train(recipe, "--resume", says=("does not say which recipe", "leave out --resume"))
    (mistakes.out / "stages" / "recipe.yaml").write_text("")
    mistakes.train(recipe, "--resume", says=("holds a run with another", "leave out --resume"))
    (mistakes.out / "stages" / "recipe.yaml").unlink()
    # without its record it may be somebody's own
    mistakes.train(recipe, says=("stages is not of a run, and would be deleted", "name another --out"))


def test_commands(tmp_path: Path, mistakes: Mistakes) -> None:
    mistakes("trian", says=("no command 'trian'", "known: train", "did you mean 'train'?"))
    mistakes("train", says=("required: recipe", "see nab train --help"))
    mistakes("train", "--reusme", "x.yaml", says=("--reusme", "--help"))
    mistakes("scan", "digits", "--detector", "lgaa", "--out", mistakes.out, says=("no detector 'lgaa'", "did you mean 'lga'?"))
    mistakes("scan", "digits", "epochs=3", "--out", mistakes.out, says=("scan settings", "did you mean 'train.epochs'?"))
    mistakes("scan", tmp_path / "nothing", "--out", mistakes.out, says=("no such folder or data set",))
    mistakes("poison", "digits", "--rate", "0.1", "--out", tmp_path / "p", says=("required: --attack",))
    mistakes("poison", "digits", "--attack", "badnets", "--rate", "x", "--out", tmp_path / "p", says=("--rate", "'x'"))
    assert main([]) == 2


def test_evaluate(tmp_path: Path, mistakes: Mistakes) -> None:
    file = tmp_path / "foreign.safetensors"
    mistakes("evaluate", file, "--data", "digits", says=("no such file", "foreign.safetensors"))
    mistakes("evaluate", tmp_path, "--data", "digits", says=("no such file", "model.safetensors"))
    file.write_bytes(b"rubbish")
    mistakes("evaluate", file, "--data", "digits", says=("is not a safetensors file",))
    io.save_tensors(file, {"x": torch.zeros(1)}, {"format": "pt"})
    mistakes("evaluate", file, "--data", "digits", says=("was not saved by this package",))
    mistakes("evaluate", file, "size=3", "--data", "digits", says=("'size=3' sets an attack", "--attack"))
    mistakes("evaluate", file, "--data", "digits", "--attack", "badnet", says=("no attack 'badnet'", "did you mean 'badnets'?"))
    mistakes("evaluate", file, "--data", "digits", "--attack", "sig", "dleta=3", says=("did you mean 'delta'?",))
    mistakes("evaluate", file, says=("required: --data",))


class Broken(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        raise ValueError("sample 1 came with another label; scan again")


def test_mistakes_found_by_a_loader_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda _: len(list(torch.utils.data.DataLoader(Broken(), num_workers=1))), []) == 2
    assert capsys.readouterr().err == "error: sample 1 came with another label; scan again\n"


def test_a_tool_itself(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "train.py"), str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: no such recipe: ")
    assert contents(tmp_path) == {}
