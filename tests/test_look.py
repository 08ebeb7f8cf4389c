from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from nab_defense import io
from nab_defense import look as looking
from nab_defense.detectors import detectors
from nab_defense.look import look, stronger_halves, with_bearers
from nab_defense.passes import confirmed
from nab_defense.pipeline import run
from nab_defense.recipe import load_recipe
from nab_defense.runtime import Runtime
from nab_defense.scan import scan_model
from nab_defense.select import Group, Selection, take_fraction
from nab_defense.session import Session
from tests.digits_runs import ROOT, TINY, write_images, write_recipe

ANY: Any = None
LF = ["attack={name: lf, rate: 0.1, target: 0}", "baselines=[undefended]"]


def test_a_group_that_shares_no_trigger_is_acquitted(tmp_path: Path) -> None:
    session = Session(load_recipe(write_recipe(tmp_path, data={"limit": 600})), tmp_path / "run", resume=False)
    network, source = session.build(), session.source
    scan = scan_model(network, session.ordered(source), source.labels, runtime=session.runtime)
    half = (scan.labels == 3) & (np.arange(len(scan)) % 2 == 0)
    group = Group(3, 5, 4.0, 0.9, int(half.sum()), 0.99)
    selection = Selection(half, half.astype(np.float32), (group,))
    selection, rises = stronger_halves(session, network, selection, np.zeros(len(half), bool), None)
    spared = confirmed(selection, scan.labels, rises)
    assert not spared.suspect.any() and spared.doubt[scan.labels == 3].sum() > 20  # it stood apart: nothing to take covers from
    assert spared.groups[0].imprint == rises[3] == pytest.approx(0, abs=0.1) and spared.groups[0].distinct
    assert spared.groups[0].acquitted and not group.acquitted


@pytest.mark.parametrize(("turned", "taken"), [([0.6, 0.9], 1), ([0.9, 0.6], 0), ([0.6, 0.6], 0)])
def test_of_two_halves_of_a_class_the_one_that_turns_more_is_suspect(
    turned: list[float], taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, session = np.repeat([0, 1, 2], 100), SimpleNamespace(runtime=None, ordered=lambda source: source)
    session.source = SimpleNamespace(labels=labels)
    upper, few = np.arange(300) < 55, (np.arange(300) >= 100) & (np.arange(300) < 130)
    known = np.arange(300) >= 270
    doubt = np.where(upper | few | known, 0.9, 0.2).astype(np.float32)
    groups = tuple(Group(k, 5, 4.0, 0.9, size, 0.9) for k, size in enumerate((55, 30, 30)))

    def imprints(network: Any, source: Any, given: np.ndarray, tried: list[np.ndarray], **rest: Any) -> list[float]:
        assert [np.flatnonzero(group).tolist() for group in tried] == [[*range(55)], [*range(100, 130)], [*range(55, 100)]]
        return [turned[0], 0.3, turned[1]]

    monkeypatch.setattr(looking.imprint, "imprints", imprints)
    selection, rises = stronger_halves(cast(Any, session), ANY, Selection(upper | few | known, doubt, groups), known, None)
    expected = (upper, ~upper & (labels == 0))[taken]
    assert np.array_equal(selection.suspect, expected | few | known) and rises == {0: turned[taken], 1: 0.3}
    np.testing.assert_allclose(selection.doubt, np.where(labels == 0, 1 - doubt, doubt) if taken else doubt)
    assert [group.size for group in selection.groups] == [(55, 45)[taken], 30, 30]


@pytest.mark.parametrize("classes", [9, 10])
def test_of_few_classes_what_is_shared_beyond_how_images_vary_is_tried(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.repeat(np.arange(classes), 50)
    suspect, given, asked = np.arange(50 * classes) % 50 < 10, list[Any](), list[Any]()
    source = SimpleNamespace(labels=labels, classes=tuple(map(str, range(classes))))
    session: Any = SimpleNamespace(runtime=None, ordered=lambda source: source, source=source)

    def imprints(network: Any, batches: Any, labels: Any, tried: list[Any], *, runtime: Any, directions: Any) -> list[float]:
        given.append(directions)
        return [0.8] * len(tried)

    def showing(batches: Any, labels: Any, groups: list[Any], *, directions: Any) -> list[Any]:
        given.append(directions)
        return groups

    monkeypatch.setattr(looking.imprint, "imprints", imprints)
    monkeypatch.setattr(looking, "bearers", showing)
    monkeypatch.setattr(looking, "variation", lambda batches, of, aside: asked.append((batches, of, aside)) or "known")
    nobody, doubt = np.zeros_like(suspect), suspect.astype(np.float32)
    directions = looking.vary(session, suspect)
    stronger_halves(session, ANY, Selection(nobody, doubt, ()), nobody, directions)
    with_bearers(session, Selection(nobody, doubt, ()), directions)
    assert given == [None, None] and not asked  # nothing to try
    stronger_halves(session, ANY, Selection(suspect, doubt, ()), nobody, directions)
    with_bearers(session, Selection(suspect, doubt, (Group(0, 5, 4.0, 0.9, 10, 0.9, 0.8),)), directions)
    assert given[2:] == ["known" if classes < 10 else None] * 2
    assert asked == [(source, labels, suspect)] * (classes < 10)  # once


@pytest.mark.parametrize(("imprint", "bear", "joined"), [(0.75, 60, True), (0.74, 60, False), (0.75, 81, False)])
def test_what_shows_a_trigger_beyond_doubt_joins_the_group(
    imprint: float, bear: int, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of class 0 the first 50 are accused; some more show what they share, but twenty must be left to compare with."""
    labels, accused = np.repeat([0, 1], 100), np.arange(200) < 50
    session: Any = SimpleNamespace(ordered=lambda source: source, source=SimpleNamespace(labels=labels))
    showing = np.where(np.arange(200) < bear, 0.9, 0.0)
    monkeypatch.setattr(
        looking, "bearers", lambda batches, given, groups, **_: [showing * np.array_equal(group, accused) for group in groups]
    )
    group = Group(0, 5, 4.0, 0.9, 50, 0.9, imprint)
    found = with_bearers(session, Selection(accused, 0.8 * accused.astype(np.float32), (group,)), None)
    assert found.suspect.sum() == found.groups[0].size == (bear if joined else 50)
    assert not found.suspect[bear:].any() and (found.doubt[50:bear] > 0.5).all() == joined


class Stop(Exception):
    pass


@pytest.mark.parametrize(("asked", "used"), [("auto", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")])
def test_the_scan_trains_in_float32_unless_told(asked: str, used: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, runtime: Runtime, **__: object) -> None:
        raise Stop(runtime.precision)

    monkeypatch.setattr(looking, "fit_once", stop)
    recipe = load_recipe(write_recipe(tmp_path), [f"runtime.precision={asked}"])
    with pytest.raises(Stop, match=f"^{used}$"):
        look(Session(recipe, tmp_path / "run", resume=False))


def test_a_smaller_network_scans_and_names_where_the_recipe_says_so(tmp_path: Path) -> None:
    smaller = TINY["model"]["kwargs"] | {"channels": [8, 8, 8, 8]}
    recipe = load_recipe(write_recipe(tmp_path, rule="paper", scan={"model": TINY["model"] | {"kwargs": smaller}}))
    result = run(recipe, tmp_path / "run")
    shipped = io.load_tensors(tmp_path / "run" / "model.safetensors")[0]
    assert io.load_state(tmp_path / "run" / "stages" / "scan.state")["fc.weight"].shape == (10, 8)
    assert [value.shape for name, value in shipped.items() if name.endswith("fc.weight")] == [(10, 32)]
    (tmp_path / "run" / "stages" / "finished.json").unlink()  # goes on from the scan that was kept
    assert run(recipe, tmp_path / "run", resume=True)["models"] == result["models"]


@pytest.mark.parametrize(
    ("name", "more", "fast", "passes"),
    [
        ("knn", {}, False, 0),
        ("nearest_center", {}, False, 0),
        ("trusted", {"trusted": "digits"}, False, 1),
        ("knn", {"encoder": TINY["model"]}, False, 1),
        ("knn", {}, True, 1),
    ],
    ids=["knn", "nearest_center", "trusted", "encoder", "bfloat16"],
)
def test_images_are_not_scanned_again_for_their_labels(
    name: str, more: dict[str, Any], fast: bool, passes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fast`: the processor has bfloat16, in which the scan is not read."""
    monkeypatch.setattr("nab_defense.runtime._cpu_has_bfloat16", lambda: fast)
    relabel = {"name": name, "params": {}, **more}
    session = Session(load_recipe(write_recipe(tmp_path, rule="paper", relabel=relabel)), tmp_path / "run", resume=False)
    scan, network = looking.scan_whole(session)
    report = detectors.create("lga").detect(scan)
    again = looking.make_finding(session, scan, report, take_fraction(report, session.recipe.fraction), network)
    read: list[int] = []

    def counted(network: Any, batches: Any, labels: Any, **given: Any) -> Any:
        read.append(len(labels))
        return scan_model(network, batches, labels, **given)

    monkeypatch.setattr(looking, "scan_model", counted)
    found = looking.accuse(session, scan, network)
    assert len(read) == passes and found.plan.suspect.sum() > 5
    assert np.array_equal(found.plan.new_labels, again.plan.new_labels) and np.array_equal(found.confidence, again.confidence)


def test_trusted_images_are_read_with_the_options_of_the_data(tmp_path: Path) -> None:
    data = {"source": "torch/image_folder", "options": {"root": str(write_images(tmp_path / "images"))}, "test": None, "limit": 5}
    relabel = {"name": "trusted", "trusted": data["source"], "params": {}}
    session = Session(load_recipe(write_recipe(tmp_path, data=data, relabel=relabel)), tmp_path / "run", resume=False)
    assert session.trusted_source.fingerprint == session.whole_source.fingerprint and len(session.trusted_source) == 6


@pytest.mark.slow
def test_poison_that_is_learned_late_is_found_in_the_trained_network(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes" / "quickstart_digits.yaml", LF)
    result = run(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "stages" / "again0.npz").exists()
    models, found = result["models"], result["detection"]
    assert models["undefended"]["asr"]["value"] > 0.9 > 0.1 > models["defended"]["asr"]["value"]
    assert found["precision"] > 0.9 and found["recall"] > 0.75 and result["verdict"]["protected"]
    assert models["defended"]["acc"]["value"] > models["undefended"]["acc"]["value"] - 0.02
    # A finished run resumes to itself; one that lost its last stages repeats them to the same weights.
    first = io.load_tensors(tmp_path / "run" / "model.safetensors")[0]
    (tmp_path / "run" / "stages" / "finished.json").unlink()
    (tmp_path / "run" / "stages" / "retrained0.state").unlink()
    run(recipe, tmp_path / "run", resume=True)
    again = io.load_tensors(tmp_path / "run" / "model.safetensors")[0]
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert io.load_json(tmp_path / "run" / "result.json")["detection"] == found


@pytest.mark.slow
def test_all_to_all_poison_which_is_thin_in_every_class_is_found(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes" / "quickstart_digits.yaml", ["attack.mode=all_to_all", "baselines=[undefended]"])
    result = run(recipe, tmp_path / "run")
    models, found = result["models"], result["detection"]
    assert models["undefended"]["asr"]["value"] > 0.9 > 0.1 > models["defended"]["asr"]["value"]
    assert found["precision"] > 0.95 and found["recall"] > 0.95 and result["verdict"]["protected"]
    assert models["defended"]["ra"]["value"] > 0.5
