"""Attacks that learn their trigger: what it looks like, that it repeats, and that its file gives it back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nab_defense import io
from nab_defense.bench import trigger as triggers
from nab_defense.bench.attacker import Classifier, seeded, to_unit
from nab_defense.bench.attacks import LearnedAttack, attacks, create, input_aware
from nab_defense.bench.attacks.base import Lesson
from nab_defense.bench.trigger import load_trigger, prepared, save_trigger
from nab_defense.data.sources import open_source
from nab_defense.runtime import Runtime
from tests.bench.quick import QUICK, TARGET, digits, ready
from tests.bench.test_attacks import noise
from tests.digits_runs import write_images

NAMES = ["input_aware", "label_consistent", "narcissus", "ssba"]
TINY = {name: {"epochs": 1, **({"mask_epochs": 1} if name == "input_aware" else {})} for name in NAMES}


def pictures(label: int | None = None, count: int = 12) -> np.ndarray:
    chosen = np.arange(len(digits())) if label is None else np.flatnonzero(digits().labels == label)
    return np.stack([digits().pixels(int(index)) for index in chosen[:count]])


def change(name: str, images: np.ndarray) -> np.ndarray:
    return ready(name).apply(images, 0).astype(int) - images


def test_who_learns() -> None:
    learners = [name for name in attacks.names() if isinstance(create(name), LearnedAttack)]
    assert learners == sorted([*NAMES, "several", "stamp_aware"])


@pytest.mark.parametrize("name", NAMES)
def test_without_its_lesson_an_attack_says_what_it_needs(name: str) -> None:
    with pytest.raises(ValueError, match=r"learns its trigger .* --trigger FILE, or attack\.trigger"):
        create(name).apply(pictures(), 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("mode", "edge"), [("RGB", 12), ("L", 40)])
def test_any_size_and_both_kinds_of_color(name: str, mode: str, edge: int, tmp_path: Path) -> None:
    source = open_source(str(write_images(tmp_path / "images", each=5, mode=mode, edge=edge)))
    attack = prepared(create(name, **TINY[name]), source, target=1, seed=0)
    for shape in ((2, edge, edge), (3, 17, 50), (1, 96, 64)):
        images = np.random.default_rng(0).integers(0, 256, (*shape, source.channels), dtype=np.uint8)
        triggered = attack.apply(images, 0)
        assert triggered.shape == images.shape and triggered.dtype == np.uint8
        assert name == "ssba" or (triggered != images).any((1, 2, 3)).all()  # in one epoch it learns next to nothing


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("mode", "other"), [("RGB", 1), ("L", 3)])
def test_images_of_other_channels_than_it_learned_on_are_refused(name: str, mode: str, other: int, tmp_path: Path) -> None:
    source = open_source(str(write_images(tmp_path / "images", each=5, mode=mode, edge=12)))
    attack: Any = prepared(create(name, **TINY[name]), source, target=1, seed=0)
    paints = [attack.apply]
    paints += [attack.cover] if name == "input_aware" else []
    paints += [attack.at_test] if name == "narcissus" else []  # label_consistent wears its patch alone then
    for paint in paints:
        with pytest.raises(ValueError, match=f"the trigger has {source.channels} channels, the images have {other}"):
            paint(noise((2, 12, 12, other)), 0)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_lesson_gives_the_same_trigger(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part, learned = digits().subset(range(200)), []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        monkeypatch.setenv("NAB_CACHE", str(tmp_path / folder))
        torch.manual_seed(len(learned))  # what others draw does not count
        before = torch.random.get_rng_state()
        learned.append(prepared(create(name, **TINY[name]), part, target=TARGET, seed=seed).apply(pictures(TARGET), 0))
        assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(learned[0], learned[1])
    assert (learned[0] != learned[2]).any()


def test_it_learns_wherever_it_is_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack, learned = create("narcissus", epochs=1, rounds=1), []
    for folder in ("a", "b"):
        monkeypatch.setenv("NAB_CACHE", str(tmp_path / folder))
        with torch.inference_mode(folder == "b"), torch.autocast("cpu", torch.bfloat16, enabled=folder == "b"):
            learned.append(prepared(attack, digits().subset(range(60)), target=TARGET, seed=0).apply(pictures(), 0))
    np.testing.assert_array_equal(*learned)


def test_what_was_learned_is_kept_by_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NAB_CACHE", str(tmp_path))
    part = digits().subset(range(60))
    kept = lambda: set(tmp_path.rglob("*.safetensors"))  # noqa: E731
    for count, (knobs, target, source) in enumerate(
        [({}, 3, part), ({"eps": 8.0}, 3, part), ({}, 4, part), ({}, 3, digits().subset(range(61)))], start=1
    ):
        attack = create("narcissus", **{"epochs": 1, "rounds": 1, **knobs})
        prepared(attack, source, target=target, seed=0)
        assert len(kept()) == count
    monkeypatch.setattr(triggers, "_lesson", lambda *_, **__: pytest.fail("learned once more"))
    again = prepared(create("narcissus", epochs=1, rounds=1), part, target=3, seed=0)
    assert again.apply(pictures(), 0).shape == pictures().shape
    with pytest.raises(ValueError, match="changes no label"):
        prepared(attack, part, target=None, seed=0)
    with pytest.raises(ValueError, match=r"target must be a class in 0\.\.9, got 10"):
        prepared(attack, part, target=10, seed=0)


def test_a_file_gives_the_trigger_back(tmp_path: Path) -> None:
    path, attack = tmp_path / "trigger.safetensors", ready("narcissus")
    assert save_trigger(path, attack, target=TARGET) and not save_trigger(tmp_path / "none", create("blend"), target=0)
    back = load_trigger(path, create("narcissus", **QUICK["narcissus"]), target=TARGET)
    np.testing.assert_array_equal(back.at_test(pictures(), 0), attack.at_test(pictures(), 0))
    for made, target, message in (
        (create("narcissus"), TARGET, "holds a trigger of attack Narcissus.*and Narcissus"),
        (create("narcissus", **QUICK["narcissus"]), 4, "holds a trigger of target 3, and 4 is asked for"),
        (create("blend"), 0, "learns no trigger"),
    ):
        with pytest.raises(ValueError, match=message):
            load_trigger(path, made, target=target)
    with pytest.raises(ValueError, match="no such file"):
        load_trigger(tmp_path / "nowhere", create("narcissus"), target=TARGET)
    io.save_tensors(path, {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="is not a trigger of this package"):
        load_trigger(path, create("narcissus"), target=TARGET)


def test_a_whole_number_and_the_same_float_are_one_setting(tmp_path: Path) -> None:
    part, path = digits().subset(range(60)), tmp_path / "trigger.safetensors"
    whole, point = (create("narcissus", epochs=1, rounds=1, eps=eps) for eps in (16, 16.0))
    learned = prepared(whole, part, target=TARGET, seed=0)
    save_trigger(path, learned, target=TARGET)
    back = load_trigger(path, point, target=TARGET)
    np.testing.assert_array_equal(back.apply(pictures(), 0), learned.apply(pictures(), 0))


def test_several_teach_those_that_learn(tmp_path: Path) -> None:
    knobs = {"triggers": ["badnets", {"name": "narcissus", "target": 5, "params": {"epochs": 1, "rounds": 1}}]}
    attack = prepared(create("several", **knobs), digits(), target=0, seed=0)
    (_, first), (member, second) = attack.parts(0, 10)
    alone = prepared(create("narcissus", epochs=1, rounds=1), digits(), target=5, seed=0)
    assert (first, second) == (0, 5)
    np.testing.assert_array_equal(member.apply(pictures(), 0), alone.apply(pictures(), 0))
    assert save_trigger(tmp_path / "t.safetensors", attack, target=0)
    back = load_trigger(tmp_path / "t.safetensors", create("several", **knobs), target=0)
    np.testing.assert_array_equal(back.at_test(pictures(), 0), attack.at_test(pictures(), 0))


def test_narcissus_stays_in_its_budget_and_grows_at_test_time() -> None:
    grey = np.full((2, 8, 8, 1), 128, np.uint8)
    attack = ready("narcissus")
    trigger, tested = (paint(grey, 0).astype(int) - 128 for paint in (attack.apply, attack.at_test))
    assert 8 < np.abs(trigger).max() <= 16 and (trigger[0] == trigger[1]).all()
    assert np.abs(tested - 3 * trigger).max() <= 2


def test_narcissus_draws_a_network_to_the_target() -> None:
    others = pictures()[digits().labels[:12] != TARGET]
    network = classifier()
    with torch.no_grad():
        before, after = (
            network(to_unit(images)).softmax(1)[:, TARGET].mean() for images in (others, ready("narcissus").at_test(others, 0))
        )
    assert after > 5 * before


def classifier() -> Classifier:
    """The clean network that label_consistent learned."""
    return ready("label_consistent").network


def test_label_consistent_hides_the_class_within_its_budget() -> None:
    images = pictures(TARGET, 40)
    moved = change("label_consistent", images)
    corners = np.zeros((8, 8), dtype=bool)
    corners[np.ix_([0, 1, 6, 7], [0, 1, 6, 7])] = True
    assert 8 < np.abs(moved[:, ~corners]).max() <= 16
    perturbed = (images + moved).astype(np.uint8)
    assert (perturbed[:, corners] == perturbed[:1, corners]).all() and set(np.unique(perturbed[:, corners])) == {0, 255}
    perturbed[:, corners] = images[:, corners]
    with torch.no_grad():
        before, after = (classifier()(to_unit(batch)).softmax(1)[:, TARGET].mean() for batch in (images, perturbed))
    assert after < before - 0.1


def test_label_consistent_wears_the_patch_alone_at_test_time() -> None:
    images = np.full((1, 32, 32, 3), 90, np.uint8)
    tested = create("label_consistent").at_test(images, 0)[0, ..., 0]
    np.testing.assert_array_equal(tested[-3:, -3:], [[0, 0, 255], [0, 255, 0], [255, 0, 255]])
    np.testing.assert_array_equal(tested, tested[::-1])
    np.testing.assert_array_equal(tested, tested[:, ::-1])
    assert (tested != 90).sum() == 36


def test_ssba_residuals_differ_by_image_and_stay_in_budget() -> None:
    images = pictures(count=30)
    residuals = change("ssba", images)
    assert 4 < np.abs(residuals).max() <= 2 * 24  # centered, so up to twice
    flat = residuals.reshape(30, -1)
    likeness = np.corrcoef(flat)[np.triu_indices(30, 1)]
    assert np.median(np.abs(likeness)) < 0.7 and len({row.tobytes() for row in flat}) == 30
    grey = np.full((1, 8, 8, 1), 128, np.uint8)
    np.testing.assert_array_equal(ready("ssba").apply(grey, 0), grey)  # nothing to write on


@pytest.mark.slow
def test_ssba_hides_bits_that_its_decoder_reads() -> None:
    attack = prepared(create("ssba", epochs=30), digits(), target=TARGET, seed=0)
    decoder = Classifier(1, attack.bits)
    decoder.load_state_dict({k.removeprefix("decoder."): v for k, v in attack.tensors.items() if k.startswith("decoder.")})
    with torch.no_grad():
        read = decoder.eval()(to_unit(attack.apply(pictures(count=200), 0)))
    assert ((read > 0) == (attack.tensors["secret"] > 0)).float().mean() > 0.7


def test_input_aware_masks_are_small_and_differ_by_image() -> None:
    images = pictures(count=30)
    attack = ready("input_aware")
    with torch.no_grad():
        masks = attack.networks[1](to_unit(images))
    assert masks.mean() < 0.15
    flat = masks.flatten(1).numpy()
    assert len({row.tobytes() for row in flat}) == 30
    touched = np.abs(change("input_aware", images)) > 8
    assert touched.mean() < 0.4


def test_input_aware_sends_an_image_with_its_own_trigger_to_the_target_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    learners = list[torch.nn.Module]()

    def spy(build: Callable[[], torch.nn.Module], seed: int) -> torch.nn.Module:
        learners.append(seeded(build, seed))
        return learners[-1]

    monkeypatch.setattr(input_aware, "seeded", spy)
    attack: Any = create("input_aware", epochs=12)
    shown, held, labels = pictures(count=1138), pictures(count=1438)[1138:], digits().labels
    attack = attack.taught(attack.learn(Lesson(shown, labels[:1138], 10, TARGET, 1, Runtime(device="cpu"))))
    network, labels = learners[-1].eval(), labels[1138:]
    images = {"clean": held, "own": attack.apply(held, 0), "another's": attack.cover(held, 0)}
    with torch.no_grad():
        named = {kind: network(to_unit(some)).argmax(1).numpy()[labels != TARGET] for kind, some in images.items()}
    reached = {kind: (names == TARGET).mean() for kind, names in named.items()}
    assert reached["own"] > 0.5 and reached["own"] > reached["another's"] + 0.3
    right = {kind: (names == labels[labels != TARGET]).mean() for kind, names in named.items()}
    assert right["clean"] > 0.7 and right["another's"] > 0.5


def test_input_aware_learns_from_data_with_the_same_image_again_and_again() -> None:
    again = digits().subset([0] * 60 + list(range(60)))
    attack = prepared(create("input_aware", **TINY["input_aware"]), again, target=TARGET, seed=0)
    assert all(values.isfinite().all() for values in attack.tensors.values())
    assert (attack.apply(pictures(), 0) != pictures()).any((1, 2, 3)).all()


@pytest.mark.parametrize(("goals", "least"), [([7], 100), ([None], 0)])
def test_a_lesson_has_enough_of_the_class_whose_own_images_are_changed(
    goals: list[int | None], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triggers, "LARGEST", 200)
    lesson = triggers._lesson(digits(), goals, target=7, seed=0, runtime=Runtime())
    of_seven = int((lesson.labels == 7).sum())
    assert of_seven == least or (not least and of_seven < 40)
    assert len(lesson.labels) == 200 + max(0, least - int((digits().limited(200, 0).labels == 7).sum()))


def test_what_was_learned_must_be_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(create("narcissus")), "learn", lambda self, lesson: {"trigger": torch.tensor([torch.nan])})
    with pytest.raises(ValueError, match="Narcissus learned a trigger that is not finite"):
        prepared(create("narcissus", epochs=3), digits(), target=TARGET, seed=7)


def test_input_aware_covers_wear_the_trigger_of_another_image() -> None:
    images, attack = pictures(count=20), ready("input_aware")
    covers = attack.cover(images, 1)
    assert (covers != attack.apply(images, 1)).any((1, 2, 3)).all() and (covers != attack.cover(images, 2)).any()
    patterns, masks = attack.tensors["donor_patterns"], attack.tensors["donor_masks"]
    clean = to_unit(images[:1])
    worn = (clean * (1 - masks) + patterns * masks).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    assert (worn == covers[0]).all((1, 2, 3)).any()
