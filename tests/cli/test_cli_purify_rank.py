"""nab purify --method rnp: the network that forgot the clean images tells the target class and ranks the training images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor

from nab_defense import io
from nab_defense.checkpoint import build_function
from nab_defense.clean import CleanSet
from nab_defense.cli import main
from nab_defense.data import build_transform, open_source
from nab_defense.repair import read_suspects

TARGET, POISONED = 3, 90
NETS = """from torch import nn

def block(taken, given, stride=1):
    return [nn.Conv2d(taken, given, 3, stride, 1, bias=False), nn.BatchNorm2d(given), nn.ReLU()]

def small():
    body = [*block(1, 16), *block(16, 32), *block(32, 32, 2), *block(32, 64)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
"""
RUN = ["purify", "--model", "rank_nets:small", "--checkpoint", "bad.pth", "--mean", "0.3", "--std", "0.35", "--input-size", "8"]


def write(folder: Path, images: Tensor, labels: Tensor) -> None:
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        path = folder / str(label) / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The current folder with train/, clean/ and bad.pth, trained on train/; the names of the poisoned files."""
    digits = CleanSet.read(open_source("digits").view(build_transform("none", 8)))
    assert digits.labels is not None
    images, labels = digits.images[:900].clone(), digits.labels[:900].clone()
    torch.manual_seed(0)
    (tmp_path / "rank_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    network, bad = build_function("rank_nets:small"), torch.randperm(900)[:POISONED]
    images[bad, :, -2:, -2:], labels[bad] = 255, TARGET
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(10):
        for rows in torch.randperm(900).split(60):
            optimizer.zero_grad()
            F.cross_entropy(network((images[rows] / 255 - 0.3) / 0.35), labels[rows]).backward()
            optimizer.step()
    torch.save(network.state_dict(), tmp_path / "bad.pth")
    write(tmp_path / "train", images, labels)
    write(tmp_path / "clean", digits.images[900:], digits.labels[900:])
    return {f"{TARGET}/{index:03d}.png" for index in bad.tolist()}


def test_what_a_scan_accused_helps_to_judge(poisoned: set[str]) -> None:
    listed = "".join(f"{name},{TARGET},{(TARGET + 1) % 10},1,kept,x\n" for name in sorted(poisoned))
    Path("suspects.csv").write_text("id,label,proposed,score,action,evidence\n" + listed)
    brief = ["steps=2", "augment=false", "runtime.threads=1", "max_drop=0.9"]
    accused = ["--suspects", "suspects.csv", "--training", "train"]
    main([*RUN, "--clean", "clean", "--method", "ibau", *brief, *accused, "--out", "out"])
    found = json.loads(Path("out/result.json").read_text())
    assert found["before"]["obeyed"] > 0.9 and found["before"]["class"] == TARGET
    assert found["before"]["proxy"] >= found["before"]["obeyed"] and all("obeyed" in row for row in found["candidates"])
    listed = {"file": "suspects.csv", "sha256": io.file_hash(Path("suspects.csv")), "images": POISONED}
    assert found["suspects"] == {**listed, "source": "train", "fingerprint": open_source("train").fingerprint}
    assert "or of suspects that are given their old label," in found["verdict"]["text"]


def test_of_clean_label_poison_nobody_judges(poisoned: set[str]) -> None:
    """Its label is right. Most of a group say so; what was named otherwise is named wrong."""
    bad = sorted(poisoned)
    rows = [f"{name},{TARGET},{TARGET + (place < 4)},1,dropped,x" for place, name in enumerate(bad[:10])]
    rows += [f"{name},{TARGET},{TARGET},1,stamped as cover,x" for name in bad[10:30]]  # no suspects
    listed = Path("suspects.csv")
    listed.write_text("\n".join(["id,label,proposed,score,action,evidence", *rows]))
    with pytest.raises(ValueError, match="gives no image another label"):
        read_suspects(listed, open_source("train"), size=8, seed=0)
    listed.write_text(listed.read_text().replace(f",{TARGET},{TARGET},1,dropped", f",{TARGET},{TARGET + 1},1,dropped", 3))
    assert len(read_suspects(listed, open_source("train"), size=8, seed=0)) == 7


def test_target_and_ranking_also_where_nothing_is_repaired(poisoned: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    brief = ["recover_steps=1", "mask_lr=1e-6", "runtime.threads=1"]
    assert main([*RUN, "--clean", "clean", "--method", "rnp", *brief, "--rank", "train", "--out", "out"]) == 3
    found, shown = json.loads(Path("out/result.json").read_text()), capsys.readouterr().out
    assert found["stopped"].startswith("rnp: recovery failed") and found["status"] == "rejected"
    assert found["evidence"]["likely_target"] == TARGET and found["evidence"]["likely_target_share"] > 0.5
    assert f"of them '{TARGET}': a hint at the target class" in shown
    assert f"turns them to '{found['before']['class']}': a hint at the attack's target, which can be wrong" in shown
    assert found["ranked"] == {"source": "train", "fingerprint": open_source("train").fingerprint, "images": 900}
    rows = io.load_csv(Path("out/suspects.csv"), ("id", "label", "proposed", "score", "action", "evidence"))
    scores = [float(row["score"]) for row in rows]
    assert len(rows) == 900 and scores == sorted(scores, reverse=True)
    assert all(row["id"].startswith(f"{row['label']}/") and row["action"] == "kept" for row in rows)
    assert rows[0]["evidence"] == "rnp; 1 of 900" and roc_auc_score([row["id"] in poisoned for row in rows], scores) > 0.9
