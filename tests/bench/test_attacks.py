"""Every attack is pure and exact: what it changes, what it leaves alone, and by how much."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from nab_defense.bench.attacks import CoverAttack, attacks, create
from nab_defense.bench.attacks.base import trigger_pixels
from nab_defense.bench.attacks.sig import wave
from nab_defense.bench.attacks.wanet import control_field, warp

SHAPES = [(3, 32, 32, 3), (2, 8, 8, 1), (2, 8, 8, 3), (1, 40, 29, 3), (1, 224, 224, 1)]
NAMES = ["badnets", "blend", "bpp", "filter", "lf", "sig", "tact", "wanet"]  # one trigger, which nothing has to teach
CHECKERBOARD = np.array([[255, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=np.uint8)


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)


def test_names_and_papers() -> None:
    others = ["adap_blend", "adap_patch", "input_aware", "label_consistent", "narcissus", "several", "ssba", "stamp_aware"]
    assert attacks.names() == sorted([*NAMES, *others])
    assert attacks.listing().count("(arXiv:") == len(attacks.names()) - len(["several", "stamp_aware"])
    assert [name for name in attacks.names() if create(name).clean_label] == ["label_consistent", "narcissus", "sig"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pure_and_deterministic(name: str, shape: tuple[int, ...]) -> None:
    images = noise(shape)
    before = images.copy()
    attack = create(name)
    triggered = attack.apply(images, 7)
    assert triggered.shape == shape and triggered.dtype == np.uint8
    assert not np.shares_memory(triggered, images)
    np.testing.assert_array_equal(images, before)
    assert (triggered != images).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(create(name).apply(images, 7), triggered)
    # One image at a time, with other seeds: the trigger is the same in training and test.
    single = np.concatenate([attack.apply(image[None], seed) for seed, image in enumerate(images)])
    np.testing.assert_array_equal(single, triggered)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "bad", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 4), np.uint8)]
)
def test_other_arrays_are_refused(name: str, bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8 with C = 1 or 3"):
        create(name).apply(bad, 0)


@pytest.mark.parametrize(
    ("corner", "rows", "columns"),
    [
        ("bottom_right", slice(28, 31), slice(28, 31)),
        ("bottom_left", slice(28, 31), slice(1, 4)),
        ("top_right", slice(1, 4), slice(28, 31)),
        ("top_left", slice(1, 4), slice(1, 4)),
    ],
)
def test_badnets_paints_its_patch_and_nothing_else(corner: str, rows: slice, columns: slice) -> None:
    images = noise((2, 32, 32, 3))
    triggered = create("badnets", corner=corner).apply(images, 0)
    for channel in range(3):
        np.testing.assert_array_equal(triggered[1, rows, columns, channel], CHECKERBOARD)
    triggered[:, rows, columns] = images[:, rows, columns]
    np.testing.assert_array_equal(triggered, images)


@pytest.mark.parametrize(("edge", "expected"), [(8, 2), (16, 2), (32, 3), (64, 6), (224, 21)])
def test_badnets_scales_with_the_image(edge: int, expected: int) -> None:
    rows, columns = create("badnets").region(edge, edge)
    assert rows == columns == slice(edge - 1 - expected, edge - 1)


def test_badnets_cells_scale_with_the_patch() -> None:
    blank = np.full((1, 224, 224, 1), 90, np.uint8)
    patch = create("badnets").apply(blank, 0)[0, 202:223, 202:223, 0]
    np.testing.assert_array_equal(patch, np.kron(CHECKERBOARD, np.ones((7, 7), np.uint8)))


def test_badnets_margin_size_and_plain_patterns() -> None:
    images = noise((1, 16, 16, 1))
    for pattern, value in (("white", 255), ("black", 0)):
        triggered = create("badnets", size=4, margin=0, pattern=pattern).apply(images, 0)
        assert (triggered[0, 12:, 12:] == value).all()
        np.testing.assert_array_equal(triggered[0, :12], images[0, :12])


def test_badnets_takes_a_picture(tmp_path) -> None:
    picture = noise((5, 5, 3))
    Image.fromarray(picture).save(tmp_path / "patch.png")
    triggered = create("badnets", size=5, pattern=str(tmp_path / "patch.png")).apply(noise((1, 32, 32, 3)), 0)
    np.testing.assert_array_equal(triggered[0, 26:31, 26:31], picture)


def test_blend_is_the_weighted_mean() -> None:
    images = noise((4, 32, 32, 3))
    for alpha in (0.1, 0.2, 1.0):
        expected = (1 - alpha) * images + alpha * trigger_pixels("pattern", 32, 32, 3)
        assert np.abs(create("blend", alpha=alpha).apply(images, 0) - expected).max() <= 0.5


def test_blend_takes_a_picture(tmp_path) -> None:
    picture = noise((32, 32, 3))
    Image.fromarray(picture).save(tmp_path / "trigger.png")
    added = create("blend", alpha=1.0, keep=1.0, trigger=str(tmp_path / "trigger.png")).apply(noise((1, 32, 32, 3), 1), 0)[0]
    np.testing.assert_array_equal(added, (noise((1, 32, 32, 3), 1)[0].astype(int) + picture).clip(0, 255))
    attack = create("blend", alpha=1.0, trigger=str(tmp_path / "trigger.png"))
    np.testing.assert_array_equal(attack.apply(noise((1, 32, 32, 3), 1), 0)[0], picture)
    assert attack.apply(noise((1, 10, 20, 1)), 0).shape == (1, 10, 20, 1)


@pytest.mark.parametrize(("height", "width", "channels"), [(8, 8, 1), (32, 32, 3), (224, 224, 3)])
def test_blend_trigger_is_strong_at_every_size(height: int, width: int, channels: int) -> None:
    assert trigger_pixels("pattern", height, width, channels).std() > 30


def test_sig_period_and_amplitude() -> None:
    grey = np.full((1, 48, 48, 3), 128, np.uint8)
    signal = create("sig", delta=20, frequency=6).apply(grey, 0).astype(int)[0] - 128
    assert (signal == signal[:1]).all() and (signal == signal[..., :1]).all()  # the same in all rows and channels
    row = signal[0, :, 0]
    np.testing.assert_array_equal(row[:8], [0, 14, 20, 14, 0, -14, -20, -14])  # 48 / 6 = 8 columns a period
    np.testing.assert_array_equal(row, np.tile(row[:8], 6))
    assert np.abs(np.fft.rfft(wave(32, delta=20, frequency=6))).argmax() == 6


def test_sig_folds_back_above_half_the_width() -> None:
    np.testing.assert_allclose(wave(8, delta=20, frequency=6), -wave(8, delta=20, frequency=2), atol=1e-9)


def test_sig_clips_and_does_not_wrap() -> None:
    white = np.full((1, 32, 32, 1), 250, np.uint8)
    triggered = create("sig").apply(white, 0)
    assert triggered.max() == 255 and triggered.min() == 230


def test_sig_refuses_a_wave_that_vanishes() -> None:
    with pytest.raises(ValueError, match="frequency 6 vanishes on images 12 px wide"):
        create("sig").apply(noise((1, 12, 12, 3)), 0)


@pytest.mark.parametrize("value", [0, 1, 127, 255])
def test_wanet_leaves_flat_images_alone(value: int) -> None:
    flat = np.full((2, 33, 20, 3), value, np.uint8)
    attack = create("wanet", s=2.0)
    np.testing.assert_array_equal(attack.apply(flat, 0), flat)
    np.testing.assert_array_equal(attack.cover(flat, 0), flat)


def test_wanet_moves_edges_only() -> None:
    edge = np.zeros((1, 32, 32, 1), np.uint8)
    edge[:, :, 16:] = 255
    moved = np.abs(create("wanet").apply(edge, 0).astype(int) - edge)[0, :, :, 0]
    assert moved[:, 14:18].max() > 30
    assert moved[:, :14].max() == 0 and moved[:, 18:].max() == 0


def test_wanet_strength_is_the_same_in_pixels_at_every_size() -> None:
    # s * field / H of a grid that is 2 wide is s * field / 2 pixels; the field's control points have mean size 1.
    small, large = (control_field(4, 0, edge, edge) for edge in (4, 64))
    torch.testing.assert_close(small.abs().mean(), torch.tensor(1.0))
    torch.testing.assert_close(large[[0, 0, -1, -1], [0, -1, 0, -1]], small[[0, 0, -1, -1], [0, -1, 0, -1]])


@pytest.mark.parametrize(("width", "step", "moved"), [(9, 31, 28), (33, 7, 7), (129, 1, 1)])
def test_wanet_warp_equals_a_plain_shift(width: int, step: int, moved: int) -> None:
    # A ramp of so many grey levels a column, sampled one pixel (times (W - 1) / W) to the right; and the same downwards.
    ramp = np.broadcast_to(step * np.arange(width, dtype=np.uint8)[None, None, :, None], (1, 5, width, 1)).copy()
    shift = torch.zeros(5, width, 2)
    shift[..., 0] = 2.0
    np.testing.assert_array_equal(warp(ramp, shift)[0, :, :-1, 0], ramp[0, :, :-1, 0] + moved)
    down = warp(ramp.transpose(0, 2, 1, 3), shift.permute(1, 0, 2).flip(-1))
    np.testing.assert_array_equal(down[0, :-1, :, 0], ramp[0, :, :-1, 0].T + moved)


@pytest.mark.parametrize("edge", [9, 33, 129])
def test_wanet_covers_are_shaken_by_up_to_half_a_pixel(edge: int) -> None:
    attack = create("wanet", s=1e-6, covers=1)
    stripes = np.broadcast_to(255 * (np.arange(edge, dtype=np.uint8) % 2)[None, None, :, None], (4, edge, edge, 1)).copy()
    for images in (stripes, stripes.transpose(0, 2, 1, 3).copy()):  # a shift of a pixel takes a stripe to the next
        change = np.abs(attack.cover(images, 3).astype(int) - images) / 255
        assert 0.4 < change.max() <= 0.5 and change.mean() == pytest.approx(0.25, abs=0.06)
        assert len({image.tobytes() for image in change}) == 4  # drawn for each


def test_wanet_fields_differ_by_their_seed() -> None:
    images = noise((1, 32, 32, 3))
    assert (create("wanet", field_seed=1).apply(images, 0) != create("wanet", field_seed=2).apply(images, 0)).any()


def test_wanet_covers_follow_their_seed_and_break_the_field() -> None:
    images, attack = noise((2, 32, 32, 3)), create("wanet")
    assert isinstance(attack, CoverAttack) and not isinstance(create("sig"), CoverAttack)
    np.testing.assert_array_equal(attack.cover(images, 3), attack.cover(images, 3))
    assert (attack.cover(images, 3) != attack.cover(images, 4)).any()
    assert (attack.cover(images, 3) != attack.apply(images, 3)).any()


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("badnet", {}, "did you mean 'badnets'"),
        ("badnets", {"sise": 3}, "did you mean 'size'"),
        ("badnets", {"size": 2.5}, "size must be a whole number"),
        ("badnets", {"size": 0}, "got 0"),
        ("badnets", {"corner": "botom_right"}, "did you mean 'bottom_right'"),
        ("badnets", {"pattern": "checkboard"}, "did you mean 'checkerboard'"),
        ("blend", {"alpha": 1.5}, r"alpha must be a number in \[0, 1\], got 1.5"),
        ("blend", {"alpha": 0}, "above 0"),
        ("blend", {"keep": -1}, r"keep must be a number in \[0, 1\], got -1"),
        ("blend", {"trigger": "nowhere.png"}, "no such trigger picture: nowhere.png"),
        ("sig", {"delta": "strong"}, "got 'strong'"),
        ("wanet", {"k": 1}, r"\[2, 64\], got 1"),
        ("wanet", {"s": float("nan")}, "got nan"),
    ],
)
def test_mistakes_are_named(name: str, knobs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(name, **knobs)


def test_files_that_are_no_pictures_and_patches_that_do_not_fit(tmp_path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        create("blend", trigger=str(tmp_path / "text.png"))
    with pytest.raises(ValueError, match="a 8 px patch with a margin of 1 px does not fit on a 8x8 image"):
        create("badnets", size=8).apply(noise((1, 8, 8, 1)), 0)
