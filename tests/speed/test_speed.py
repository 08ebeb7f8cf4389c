"""Each benchmark at a tiny size: its figures are of the form that it says, and follow from what it measured."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nab_defense import speed
from nab_defense.cli import main
from nab_defense.purify import purifiers
from nab_defense.speed import fitting, running, scanning, timing, vectors

TINY = {"size": 16, "batch_size": 8, "repeats": 2}


def check_pair(pair: dict[str, Any], repeats: int) -> None:
    """Times of all turns, and the quartiles of their ratio."""
    first, second = pair["of"].split(" / ")
    assert list(pair["seconds"]) == [first, second]
    one, other = (np.array(pair["seconds"][name]) for name in (first, second))
    assert len(one) == len(other) == repeats and (one > 0).all() and (other > 0).all()
    expected = np.percentile(one / other, [25, 50, 75])
    np.testing.assert_allclose([pair["ratio"][name] for name in ("low", "median", "high")], expected)


def test_turns_alternate_and_ratios_are_turn_by_turn() -> None:
    order: list[str] = []
    found = timing.side_by_side(("a", lambda: order.append("a")), ("b", lambda: order.append("b")), repeats=3)
    assert "".join(order) == "ab" + "abbaab" and set(found["first_run"]) == {"a", "b"}
    check_pair(found, 3)


def test_no_turn_begins_when_patience_is_over() -> None:
    found = timing.side_by_side(("a", lambda: 1), ("b", lambda: time.sleep(0.05)), repeats=9, warm=False, patience=0.12)
    check_pair(found, 3)


def test_peak_memory_is_that_of_the_task_alone() -> None:
    timing.peak_memory(lambda: np.ones(2**24).sum())
    _, less = timing.peak_memory(lambda: np.ones(2**20).sum())
    _, more = timing.peak_memory(lambda: np.ones(2**23).sum())
    assert less < 40 < more < 100  # 8 and 64 MB, less what the process had free already


@pytest.mark.parametrize("name", ["training", "training_224"])
def test_training(name: str) -> None:
    found = getattr(fitting, name)(count=20, **TINY)
    for layout in ("same_layout", "timm_layout", "timm_script"):
        check_pair(found[layout], 2)
        assert found[layout]["of"] == "timm / ours"
    assert found["settings"]["images"] == 20 and found["settings"]["workers"] == 0
    assert set(found["peak_mb"]) == {"timm", "ours"} and min(found["peak_mb"].values()) > 0


def test_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("torch.compile", lambda network: seen.append(network) or network)  # which takes minutes
    found = fitting.compiled(count=20, **TINY)
    check_pair(found["epoch"], 2)
    first, later = found["epoch"]["first_run"]["compiled"], np.median(found["epoch"]["seconds"]["compiled"])
    assert len(seen) == 3 and found["first_step_seconds"] == first - later


def test_whole() -> None:
    found = running.whole(count=100, size=8, epochs=1, scan_epochs=1, batch_size=16, repeats=1)
    check_pair(found["run"], 1)
    assert found["run"]["of"] == "defended / plain" and {"scan", "train", "check"} <= set(found["stages"])


def test_scan_growth() -> None:
    found = running.scan_growth(count=60, factor=2, size=8, epochs=1, batch_size=16)
    small, large = found["runs"]
    assert (small["images"], large["images"]) == (60, 120) and large["images_mb"] == 120 * 3 * 64 / 2**20
    assert found["times"] == {key: large[key] / small[key] for key in ("seconds", "process_mb", "added_mb")}
    assert small["process_mb"] > small["added_mb"]


@pytest.mark.slow
def test_ranks() -> None:
    found = running.ranks(count=40, epochs=2, size=8, batch_size=8, repeats=1)
    assert {name: len(times) for name, times in found["seconds"].items()} == dict.fromkeys(running.WAYS, 1)
    for name in ("one_thread", "two_threads"):
        of, ratio = found[name]["of"], found["seconds"][name][0] / found["seconds"]["two_ranks"][0]
        assert of == f"{name} / two_ranks" and found[name]["ratio"]["median"] == pytest.approx(ratio)


def test_a_training_by_ranks_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "Traceback\n[rank1]: ValueError: no such folder\nmore\nhost: x\n"
    monkeypatch.setattr("subprocess.run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", told))
    with pytest.raises(ValueError, match=r"^training by 2 processes failed: \[rank1\]: ValueError: no such folder$"):
        running._epochs({}, 2, 1)


def test_wrapper() -> None:
    found = fitting.wrapper(count=20, **TINY)
    for name in ("loader", "resident", "training"):
        check_pair(found[name], 2)
    plan = fitting.some_plan(np.arange(20) % 10)
    assert plan.stamped.sum() == plan.suspect.sum() == 2


def test_defended() -> None:
    found = fitting.defended(count=16, **TINY)
    for network in ("small", "resnet18"):
        check_pair(found[network], 2)
        assert 0 < found[network]["stamp_share"]["median"] < 1


def test_scan() -> None:
    found = scanning.scan(count=80, **TINY)
    check_pair(found["epoch"], 2)
    assert len(found["look_seconds"]) == 2 and min(found["look_seconds"]) > 0


def test_kmeans_reaches_the_inertia_that_it_is_compared_with() -> None:
    found = vectors.kmeans(rows=3000, dims=16, centers=(5,), threads=(1, 1), repeats=2)
    first, second = found["runs"]
    check_pair(first, 2)
    assert first["inertia"] == second["inertia"] and first["inertia_ratio"] < 1.01
    assert first["inertia_ratio"] == first["inertia"]["ours"] / first["inertia"]["scikit-learn"]
    check_pair(first["equal"], 2)
    assert first["equal_ratio"] == first["inertia"]["ours"] / first["inertia"]["equal"] == pytest.approx(1, abs=0.01)


def test_knn() -> None:
    found = vectors.knn(rows=500, index_rows=3000, queries=200, dims=16, k=5, repeats=2)
    check_pair(found["exact"], 2)
    assert 0.95 <= found["index"]["recall"] <= 1 and set(found["index"]["seconds"]) == {"exact", "index"}


def test_growth() -> None:
    found = vectors.growth(sizes=(200, 2000), dims=8)
    assert [(run["detector"], run["samples"]) for run in found["runs"]] == [
        (name, size) for size in (200, 2000) for name in ("spectral", "activation_clustering", "knn")
    ]
    for small, large in zip(found["runs"][:3], found["runs"][3:], strict=True):
        assert large["times"] == large["seconds"] / small["seconds"] and large["features_mb"] == 10 * small["features_mb"]
    assert found["recall"] > 0.95


def test_features_are_the_same_in_memory_and_in_a_file() -> None:
    points, group = vectors.clustered(300, 8, groups=3)
    out = np.empty((300, 8), np.float32)
    again, same = vectors.clustered(300, 8, groups=3, out=out)
    assert again is out and np.array_equal(points, out) and np.array_equal(group, same) and set(group) == {0, 1, 2}


@pytest.mark.slow
def test_purify() -> None:
    found = scanning.purify(epochs=2, clean_limit=100, methods=["clp", "finetune"])
    assert set(found["methods"]) == {"clp", "finetune"} <= set(purifiers.names())
    for method in found["methods"].values():
        for part in ("method", "selection"):
            assert method["epochs"][part] == method["seconds"][part] / found["epoch_seconds"] > 0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in speed.BENCHMARKS:
        pair = timing.side_by_side(("a", lambda: 1), ("b", lambda: 2), repeats=2)
        monkeypatch.setitem(
            speed.BENCHMARKS, name, lambda repeats=2, pair=pair: {"settings": {"repeats": repeats}, "runs": [pair]}
        )


def test_command_writes_one_file_a_benchmark(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--speed", "knn", "kmeans", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"speed_knn.json", "speed_kmeans.json"}
    result = json.loads((tmp_path / "speed_knn.json").read_text())
    assert result["name"] == "knn" and {"hardware", "versions", "commit", "load", "runs"} <= set(result)
    check_pair(result["runs"][0], 2)
    said = capsys.readouterr().out
    assert "knn.runs[0]" in said and f"{result['runs'][0]['ratio']['median']:.3f}" in said
    assert set(speed.run_speed(tmp_path / "all")) == set(speed.BENCHMARKS)
    assert main(["bench", "--speed", "knn", "repeats=7", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "speed_knn.json").read_text())["settings"] == {"repeats": 7}
    assert main(["bench", "--speed", "knn", "repeat=7", "--out", str(tmp_path)]) == 2
    assert "benchmark 'knn' has no setting 'repeat'; known: repeats, pair; did you mean 'repeats'?" in capsys.readouterr().err


def test_an_unknown_benchmark_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no benchmark 'knm'; known: training, .*did you mean 'knn'"):
        speed.run_speed(tmp_path / "out", ["knm"])
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it without torchrun"):
        speed.run_speed(tmp_path / "out", ["knn"])
    assert not (tmp_path / "out").exists()
