"""Laws that hold for every attack: who is poisoned, who keeps his label, what the test carries, and that it repeats."""

from __future__ import annotations

import numpy as np
import pytest

from nab_defense.bench.attacks import AsymmetricAttack, CoverAttack, JointAttack, SourceAttack, attacks
from nab_defense.bench.poison import poison_source, triggered_source
from tests.bench.quick import TARGET, digits, ready

RATE = 0.05
NAMES = attacks.names()


def poisoned(name: str, seed: int = 0):
    return poison_source(digits(), ready(name), rate=RATE, target=TARGET, seed=seed)


@pytest.mark.parametrize("name", NAMES)
def test_labels_follow_the_kind_of_attack(name: str) -> None:
    source, truth = poisoned(name)
    clean = digits().labels
    assert truth.poisoned.sum() == pytest.approx(RATE * len(source), abs=1)
    np.testing.assert_array_equal(source.labels[~truth.poisoned], clean[~truth.poisoned])  # covers among them
    if ready(name).clean_label:
        np.testing.assert_array_equal(source.labels, clean)
        assert (clean[truth.poisoned] == TARGET).all()
    else:
        assert (source.labels[truth.poisoned] != clean[truth.poisoned]).all()
    if not isinstance(ready(name), JointAttack):
        assert (source.labels[truth.poisoned] == TARGET).all() and truth.target == TARGET


@pytest.mark.parametrize("name", NAMES)
def test_covers_are_those_that_the_attack_asks_for(name: str) -> None:
    attack, (source, truth) = ready(name), poisoned(name)
    if not isinstance(attack, CoverAttack):
        assert not truth.cover.any()
        return
    assert truth.cover.sum() == round(attack.covers * truth.poisoned.sum()) and not (truth.cover & truth.poisoned).any()
    classes = set(source.labels[truth.cover])
    assert attack.cover_target == (TARGET in classes)
    left_out = set(attack.source_classes) if isinstance(attack, SourceAttack) else set()
    assert classes <= set(range(10)) - left_out - (set() if attack.cover_target else {TARGET})


@pytest.mark.parametrize("name", NAMES)
def test_who_is_painted_and_nobody_else(name: str) -> None:
    source, truth = poisoned(name)
    again, _ = poisoned(name)
    touched = truth.poisoned | truth.cover
    for index in [*np.flatnonzero(touched)[:12], *np.flatnonzero(~touched)[:12]]:
        pixels, clean = source.pixels(index), digits().pixels(index)
        assert pixels.shape == clean.shape and pixels.dtype == np.uint8
        assert (pixels != clean).any() == touched[index]
        np.testing.assert_array_equal(again.pixels(index), pixels)
    assert again.fingerprint == source.fingerprint != poisoned(name, seed=1)[0].fingerprint


@pytest.mark.parametrize("name", NAMES)
def test_the_test_carries_the_trigger_of_the_test(name: str) -> None:
    attack = ready(name)
    if isinstance(attack, JointAttack):
        return  # see test_several_share_the_test
    triggered, true = triggered_source(digits(), attack, target=TARGET, seed=5)
    sources = attack.source_classes if isinstance(attack, SourceAttack) else tuple(set(range(10)) - {TARGET})
    assert set(true) == set(sources) and (triggered.labels == TARGET).all()
    paint = attack.at_test if isinstance(attack, AsymmetricAttack) else attack.apply
    number = {name: index for index, name in enumerate(digits().ids)}
    for index in range(0, len(triggered), 97):
        clean = digits().pixels(number[triggered.ids[index]])
        np.testing.assert_array_equal(triggered.pixels(index), paint(clean[None], 0)[0])  # whatever the seed


@pytest.mark.parametrize("name", NAMES)
def test_attacks_do_not_write_on_what_they_are_given(name: str) -> None:
    attack, images = ready(name), np.stack([digits().pixels(index) for index in range(6)])
    before = images.copy()
    paints = [attack.apply]
    paints += [attack.cover] if isinstance(attack, CoverAttack) else []
    paints += [attack.at_test] if isinstance(attack, AsymmetricAttack) else []
    for paint in paints:
        triggered = paint(images, 3)
        assert triggered.shape == images.shape and triggered.dtype == np.uint8 and not np.shares_memory(triggered, images)
        np.testing.assert_array_equal(paint(images, 3), triggered)
    np.testing.assert_array_equal(images, before)


def test_the_trigger_is_the_same_inside_a_measurement() -> None:
    """Loaders paint while a network is measured: in inference mode and under autocast."""
    import torch

    images = np.stack([digits().pixels(index) for index in np.flatnonzero(digits().labels == TARGET)[:8]])
    for name in ("label_consistent", "narcissus", "ssba", "input_aware"):
        expected = ready(name).apply(images, 0)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            np.testing.assert_array_equal(ready(name).apply(images, 0), expected)
