"""Attacks that need no teaching, each against what its paper says: pictures, budgets, who wears what."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch
from PIL import Image

from nab_defense.bench.attacks import create
from nab_defense.bench.attacks.adap_blend import piece_masks
from nab_defense.bench.attacks.adap_patch import patch_layer
from nab_defense.bench.attacks.base import trigger_pixels
from nab_defense.bench.attacks.bpp import SPREAD, dithered, quantized
from nab_defense.bench.poison import painted_by, poison_source, read_truth, triggered_source, write_truth
from nab_defense.bench.trigger import prepared
from nab_defense.stamp import Stamp
from tests.bench.quick import digits, ready
from tests.bench.test_attacks import noise

PICTURES = Path(__file__).with_name("triggers.png")  # rows: PAINTED; columns: a picture with a color ramp, a flat grey one
PAINTED = [("badnets", False), ("blend", False), ("sig", False), ("wanet", False), ("lf", False), ("bpp", False), ("tact", False)]
PAINTED += [(name, test) for name in ("adap_blend", "adap_patch") for test in (False, True)]
PAINTED += [("stamp_aware", False), ("several", False), ("label_consistent", True)]
KNOBS = {"stamp_aware": {"mean": [0.5, 0.4, 0.3]}, "several": {"triggers": ["badnets", "lf"]}}


def canvas() -> np.ndarray:
    """(2, 32, 32, 3): a ramp with a bright square on it, and plain grey."""
    down, right = np.mgrid[0:32, 0:32] * 8
    ramp = np.stack((down, right, 248 - down), axis=-1)
    ramp[10:20, 8:18] = (250, 220, 40)
    return np.stack((ramp, np.full_like(ramp, 128))).astype(np.uint8)


def painted() -> np.ndarray:
    """All triggers on the canvas, one below the other, (32 * rows, 64, 3)."""
    rows = []
    for name, test in PAINTED:
        attack = create(name, **KNOBS.get(name, {}))
        images = attack.at_test(canvas(), 4) if test else attack.apply(canvas(), 4)
        rows.append(np.concatenate(list(images), axis=1))
    return np.concatenate(rows)


def test_triggers_look_as_they_did() -> None:
    stored = np.asarray(Image.open(PICTURES)).astype(int)
    assert stored.shape == (32 * len(PAINTED), 64, 3)
    assert np.abs(painted() - stored).max() <= 2  # libraries may round otherwise


def test_lf_holds_low_frequencies_alone() -> None:
    for edge in (8, 32, 40):
        grey = np.full((1, edge, edge, 3), 128, np.uint8)
        change = create("lf", eps=100, waves=4).apply(grey, 0)[0].astype(float) - 128
        assert np.abs(change).max() == 100
        spectrum = scipy.fft.dctn(change, axes=(0, 1), norm="ortho") ** 2
        assert spectrum[:4, :4].sum() > 0.999 * spectrum.sum() and spectrum[0, 0].max() < 1e-3 * spectrum.sum()


def test_lf_is_one_picture_at_all_sizes_and_its_seed_another() -> None:
    grey = [np.full((1, edge, edge, 1), 128, np.uint8) for edge in (32, 64)]
    small, large = (create("lf").apply(images, 0)[0, ..., 0].astype(float) for images in grey)
    assert np.abs(large.reshape(32, 2, 32, 2).mean((1, 3)) - small).max() < 1.5
    assert (create("lf", field_seed=1).apply(grey[0], 0)[0, ..., 0] != small).mean() > 0.8


def slow_dither(image: np.ndarray, bits: int) -> np.ndarray:
    """Floyd and Steinberg, pixel by pixel."""
    work = image.astype(float)
    height, width = work.shape[:2]
    for y in range(height):
        for x in range(width):
            level = quantized(work[y, x], bits)
            error, work[y, x] = work[y, x] - level, level
            for down, right, share in SPREAD:
                if y + down < height and 0 <= x + right < width:
                    work[y + down, x + right] += share * error
    return work


@pytest.mark.parametrize("shape", [(2, 9, 13, 3), (1, 8, 8, 1), (1, 13, 4, 1), (1, 1, 5, 1)])
def test_bpp_dithers_as_the_pixel_by_pixel_algorithm(shape: tuple[int, ...]) -> None:
    images = noise(shape)
    np.testing.assert_allclose(dithered(images, 3), [slow_dither(image, 3) for image in images], atol=1e-9)


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_bpp_leaves_its_levels_alone_and_keeps_the_mean(bits: int) -> None:
    levels = np.unique(np.rint(np.arange(2**bits) / (2**bits - 1) * 255).astype(np.uint8))
    images = noise((3, 32, 32, 3))
    triggered = create("bpp", bits=bits).apply(images, 0)
    np.testing.assert_array_equal(np.unique(triggered), levels)
    flat = create("bpp", bits=bits).apply(np.full((1, 64, 64, 1), 100, np.uint8), 0)
    assert abs(flat.mean() - 100) < 2
    banded = create("bpp", bits=bits, dither=False).apply(images, 0)
    assert np.abs(banded.astype(int) - images).max() <= 255 / (2**bits - 1) / 2 + 1


def test_adap_blend_shows_pieces_in_training_and_all_at_test_time() -> None:
    images, attack = noise((20, 32, 32, 3)), create("adap_blend", alpha=0.4, test_alpha=0.6)
    masks = piece_masks(20, 32, 32, pieces=4, share=0.5, seed=9)
    tiles = masks.reshape(20, 4, 8, 4, 8).mean((2, 4))
    assert set(np.unique(tiles)) == {0, 1} and (tiles.sum((1, 2)) == 8).all()
    assert len({tile.tobytes() for tile in tiles}) > 15  # drawn for each image
    triggered, trigger = attack.apply(images, 9), trigger_pixels("pattern", 32, 32, 3)
    np.testing.assert_array_equal(triggered[~masks], images[~masks])
    assert np.abs(triggered - (0.6 * images + 0.4 * trigger))[masks].max() <= 0.5
    np.testing.assert_array_equal(attack.cover(images, 9), triggered)
    assert np.abs(attack.at_test(images, 9) - (0.4 * images + 0.6 * trigger)).max() <= 0.5


def test_adap_patch_shows_one_patch_in_training_and_all_at_test_time() -> None:
    images, attack = noise((40, 32, 32, 3)), create("adap_patch", alpha=0.5)
    pixels, places = patch_layer(32, 32, 3, size=None)
    assert places.sum((1, 2, 3)).tolist() == [36] * 4 and places.sum(0).max() == 1
    triggered = attack.apply(images, 2)
    differs = (triggered != images).any(-1)
    wears = np.stack([differs[:, place[..., 0] == 1].any(1) for place in places], axis=1)
    assert (wears.sum(1) == 1).all() and (wears.sum(0) > 3).all()
    number = wears[0].argmax()
    inside = places[number][..., 0] == 1
    assert np.abs(triggered[0] - (0.5 * images[0] + 0.5 * pixels[number]))[inside].max() <= 0.5
    full = attack.at_test(images, 0)
    everywhere = places.sum(0)[..., 0] == 1
    np.testing.assert_array_equal(full[:, everywhere], np.broadcast_to(pixels.sum(0)[everywhere], (40, 144, 3)))
    np.testing.assert_array_equal(full[:, ~everywhere], images[:, ~everywhere])


def test_tact_poisons_tests_and_covers_the_classes_it_says() -> None:
    attack = create("tact", sources=[1, 2], covers=2, trigger={"name": "badnets", "params": {"pattern": "white"}})
    _, truth = poison_source(digits(), attack, rate=0.1, target=0, seed=0)
    assert set(digits().labels[truth.poisoned]) == {1, 2} and set(digits().labels[truth.cover]) == set(range(3, 10))
    images = noise((2, 8, 8, 1))
    np.testing.assert_array_equal(attack.apply(images, 0), create("badnets", pattern="white").apply(images, 0))
    np.testing.assert_array_equal(attack.cover(images, 0), attack.apply(images, 0))
    assert set(triggered_source(digits(), attack, target=0, seed=0)[1]) == {1, 2}
    with pytest.raises(ValueError, match="class 2 is both the target and a source"):
        poison_source(digits(), attack, rate=0.1, target=2, seed=0)
    with pytest.raises(ValueError, match="the images that are left to this attack hold 304"):
        poison_source(digits(), attack, rate=0.3, target=0, seed=0)


def test_stamp_aware_paints_the_stamp_of_the_defence() -> None:
    attack, images = ready("stamp_aware"), noise((3, 8, 8, 1))
    mean = [float(np.mean([digits().pixels(index).mean() for index in range(len(digits()))]) / 255)]
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2)
    stamped = Stamp()(channels_first, mean=mean).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(attack.cover(images, 0), stamped)
    both = attack.apply(images, 0)
    np.testing.assert_array_equal(both[:, :2, :2], stamped[:, :2, :2])
    source = digits()
    shown, _ = triggered_source(source, attack, target=0, seed=0)
    place = int(np.flatnonzero(source.labels != 0)[0])
    np.testing.assert_array_equal(shown.pixels(0), attack.apply(source.pixels(place)[None], 0)[0])  # at test time, too
    plain = create("badnets").apply(images, 0)
    both[:, :2, :2] = plain[:, :2, :2]
    np.testing.assert_array_equal(both, plain)


def test_stamp_aware_takes_another_stamp_and_its_color() -> None:
    knobs = {"stamp": {"size": 3, "corner": "bottom_left"}, "mean": [0.2, 0.4, 0.6], "trigger": "blend"}
    attack = create("stamp_aware", **knobs)
    stamped = attack.cover(noise((1, 32, 32, 3)), 0)[0, -3:, :3]
    np.testing.assert_array_equal(stamped, np.broadcast_to([51, 102, 153], (3, 3, 3)))
    with pytest.raises(ValueError, match="color has 3 channels, the images have 1"):
        attack.cover(noise((1, 32, 32, 1)), 0)


SEVERAL = {"triggers": ["badnets", {"name": "blend", "target": 7}, {"name": "sig", "params": {"frequency": 2}}]}


def test_several_share_the_poison_and_lead_to_their_targets(tmp_path: Path) -> None:
    attack = create("several", **SEVERAL)
    source, truth = poison_source(digits(), attack, rate=0.09, target=3, seed=0)
    counts = {goal: int((source.labels[truth.poisoned] == goal).sum()) for goal in range(10)}
    assert {goal: n for goal, n in counts.items() if n} == {3: 43, 7: 43, 5: 43}  # sig is the third, so 3 + 2
    assert truth.target is None and truth.mode == "all_to_one"
    clean_label = truth.poisoned & (source.labels == 5)
    assert (digits().labels[clean_label] == 5).all()
    for name, goal in (("badnets", 3), ("blend", 7)):
        index = int(np.flatnonzero(truth.poisoned & (source.labels == goal))[0])
        np.testing.assert_array_equal(source.pixels(index), create(name).apply(digits().pixels(index)[None], 0)[0])
    write_truth(tmp_path / "truth.csv", source, truth)
    back = read_truth(tmp_path / "truth.csv", source)
    assert (back.target, back.mode) == (None, "all_to_one")


def test_several_tell_a_rate_that_does_not_fit_as_it_was_given() -> None:
    told = "of which each of the 3 attacks gets rate / 3,"
    attack = create("several", **SEVERAL)
    with pytest.raises(ValueError, match=rf"rate 0\.9, {told} needs 431 images, .* hold 55; lower it, say to 0\.1147"):
        poison_source(digits(), attack, rate=0.9, target=3, seed=0)
    with pytest.raises(ValueError, match=rf"rate 0\.001, {told} of 1438 images poisons none; the smallest possible is 0\.0021"):
        poison_source(digits(), attack, rate=0.001, target=3, seed=0)
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\), got 1\.2"):
        poison_source(digits(), attack, rate=1.2, target=3, seed=0)


def test_several_share_the_test() -> None:
    attack = create("several", **SEVERAL)
    triggered, true = triggered_source(digits(), attack, target=3, seed=0)
    assert (triggered.labels != true).all() and set(triggered.labels) == {3, 5, 7}
    np.testing.assert_array_equal(np.array([3, 7, 5])[painted_by(triggered)], triggered.labels)
    number = {name: index for index, name in enumerate(digits().ids)}
    parts = painted_by(triggered)
    assert np.bincount(parts).min() > 400 and all(len(set(true[parts == part])) == 9 for part in range(3))
    for index in range(0, len(triggered), 61):
        place = number[triggered.ids[index]]
        name, goal = [("badnets", 3), ("blend", 7), ("sig", 5)][parts[index]]
        member = create(name, **({"frequency": 2} if name == "sig" else {}))
        assert triggered.labels[index] == goal
        np.testing.assert_array_equal(triggered.pixels(index), member.apply(digits().pixels(place)[None], 0)[0])
    moved = triggered_source(digits(), create("several"), target=None, mode="all_to_all", seed=0)
    np.testing.assert_array_equal(moved[0].labels, (moved[1] + 1) % 10)


def test_an_attack_that_learns_nothing_is_prepared_as_it_is() -> None:
    attack = create("blend")
    assert prepared(attack, digits(), target=0, seed=0) is attack


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("lf", {"eps": 0}, r"eps must be a number in \[1, 255\], got 0"),
        ("lf", {"waves": 1}, r"waves must be a whole number in \[2, 16\]"),
        ("bpp", {"bits": 8}, r"bits must be a whole number in \[1, 7\], got 8"),
        ("bpp", {"dither": 1}, "dither must be bool, got 1"),
        ("adap_blend", {"alpha": 0}, "alpha must be above 0"),
        ("adap_blend", {"trigger": "patern"}, "did you mean 'pattern'"),
        ("adap_patch", {"size": 0}, "size must be a whole number"),
        ("adap_patch", {"covers": 21}, "covers must be a number in"),
        ("tact", {"sources": []}, "sources must name at least one class"),
        ("tact", {"sources": "cat"}, "sources must be a whole number"),
        ("tact", {"trigger": "badnet"}, "did you mean 'badnets'"),
        ("tact", {"trigger": "narcissus"}, "one trigger that is not learned"),
        ("tact", {"trigger": {"name": "badnets", "parms": {}}}, "did you mean 'params'"),
        ("tact", {"trigger": {"name": "badnets", "target": 1}}, "only lends its trigger"),
        ("tact", {"trigger": {"name": "wanet", "params": {"covers": 5}}}, "no covers; give it covers: 0"),
        ("label_consistent", {"size": 1}, r"size must be a whole number in \[2, 4096\], got 1"),
        ("stamp_aware", {"stamp": {"sise": 2}}, "stamp takes size, corner, value, seed, got"),
        ("stamp_aware", {"stamp": {"corner": "left"}}, "stamp corner must be one of"),
        ("stamp_aware", {"mean": [0.1, 0.2]}, "mean must be a list of 1 or 3 numbers"),
        ("several", {"triggers": "badnets"}, "a list of at least two attacks"),
        ("several", {"triggers": ["badnets", "several"]}, "cannot hold several once more"),
        ("several", {"triggers": ["badnets", 3]}, "triggers must be an attack's name"),
        ("several", {"triggers": ["badnets", {"name": "blend", "target": -1}]}, "target of blend must be a whole number"),
        ("several", {"triggers": ["badnets", {"name": "blend", "params": 3}]}, "params of blend must be a mapping"),
    ],
)
def test_mistakes_are_named(name: str, knobs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(name, **knobs)


def test_a_stamp_that_hides_the_whole_trigger_is_refused() -> None:
    corner = {"name": "badnets", "params": {"corner": "top_left", "size": 2, "margin": 0}}
    attack = create("stamp_aware", trigger=corner, stamp={"size": 8}, mean=[0.5])
    with pytest.raises(ValueError, match="the stamp hides the whole trigger of BadNets"):
        attack.apply(noise((3, 32, 32, 1)), 0)
    seen = create("stamp_aware", trigger=corner, stamp={"size": 8, "corner": "bottom_left"}, mean=[0.5])
    blank = np.zeros((1, 32, 32, 1), np.uint8)
    assert seen.apply(blank, 0)[0, :2, :2].any() and (seen.apply(blank, 0) != seen.cover(blank, 0)).sum() <= 4


def test_a_part_that_cannot_be_tested_is_said() -> None:
    attack = create("several", triggers=[{"name": "tact", "params": {"sources": 2}}, "blend"])
    nobody = digits().subset(np.flatnonzero(digits().labels != 2))
    with pytest.raises(ValueError, match=r"holds no image that Tact.* can be tested on, for target 0"):
        triggered_source(nobody, attack, target=0, seed=0)
    with pytest.raises(ValueError, match=r"sources must be classes in 0\.\.9, got 50"):
        poison_source(digits(), create("tact", sources=[1, 50]), rate=0.02, target=0, seed=0)


def test_triggers_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="four 4 px patches do not fit on a 8x8 image"):
        create("adap_patch", size=4).apply(noise((1, 8, 8, 1)), 0)
    with pytest.raises(ValueError, match="16 pieces a side do not fit on a 8x8 image"):
        create("adap_blend", pieces=16).apply(noise((1, 8, 8, 1)), 0)
