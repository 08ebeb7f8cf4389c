from __future__ import annotations

import numpy as np
import pytest

from nab_defense.relabel import relabelers
from nab_defense.relabel.trusted import Trusted, fit_linear


def draw(count: int, distance: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` samples of each of three classes in 10 dimensions, of which the last has a huge scale and no meaning."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.arange(3), count)
    features = rng.normal(size=(len(labels), 10)) + distance * np.eye(10)[labels]
    features[:, -1] *= 1000
    return features.astype(np.float32), labels


@pytest.mark.parametrize(("count", "right"), [(2, 0.6), (30, 0.98)], ids=["too few to cross-validate", "enough"])
def test_recovers_labels_though_the_given_ones_are_all_wrong(count: int, right: float, make_scan) -> None:
    features, truth = draw(50, 12, seed=1)
    suspect = np.ones(150, dtype=bool)
    trusted = relabelers.create("trusted", **dict(zip(("features", "labels"), draw(count, 12, seed=0), strict=True)))
    new_labels, confidence = trusted.relabel(make_scan(features, (truth + 1) % 3), suspect)
    assert (new_labels == truth).mean() > right
    assert new_labels.dtype == np.int64 and confidence.dtype == np.float32


def test_confidence_is_calibrated(make_scan) -> None:
    features, truth = draw(400, 2, seed=1)
    suspect = np.ones(1200, dtype=bool)
    new_labels, confidence = Trusted(*draw(100, 2, seed=0)).relabel(make_scan(features, truth), suspect)
    assert confidence.mean() == pytest.approx((new_labels == truth).mean(), abs=0.06)
    surer = confidence > np.median(confidence)
    assert (new_labels == truth)[surer].mean() > (new_labels == truth)[~surer].mean() + 0.1


def test_units_of_the_features_do_not_matter(make_scan) -> None:
    (some, labels), (features, truth) = draw(20, 2, seed=0), draw(50, 2, seed=1)
    scale, shift = np.geomspace(1e-3, 1e3, 10, dtype=np.float32), np.arange(10, dtype=np.float32)
    suspect = np.ones(150, dtype=bool)
    plain = Trusted(some, labels).relabel(make_scan(features, truth), suspect)
    moved = Trusted((some + shift) * scale, labels).relabel(make_scan((features + shift) * scale, truth), suspect)
    np.testing.assert_array_equal(plain[0], moved[0])
    np.testing.assert_allclose(plain[1], moved[1], atol=1e-3)


def test_cross_validation_regularizes_noise_away() -> None:
    rng = np.random.default_rng(0)
    probability = fit_linear(rng.normal(size=(90, 40)).astype(np.float32), np.tile(np.arange(3), 30)).predict_proba(
        rng.normal(size=(50, 40))
    )
    assert probability.max() < 0.5  # features without meaning: nothing better than about a third


def test_the_others_stay_as_they_are(make_scan) -> None:
    features, truth = draw(50, 2, seed=1)
    given, suspect = (truth + 1) % 3, np.arange(150) < 20
    trusted = Trusted(*draw(20, 2, seed=0))
    new_labels, confidence = trusted.relabel(make_scan(features, given), suspect)
    np.testing.assert_array_equal(new_labels[20:], given[20:])
    assert (confidence[20:] == 1).all()
    np.testing.assert_array_equal(trusted.relabel(make_scan(features, given), np.zeros(150, bool))[0], given)


def test_refuses_a_set_that_does_not_fit(make_scan) -> None:
    features, truth = draw(50, 2, seed=1)
    scan, suspect = make_scan(features, truth), np.ones(150, dtype=bool)
    some, labels = draw(5, 2, seed=0)
    with pytest.raises(ValueError, match="2 of 3 classes have no trusted sample: 1, 2;"):
        Trusted(some[labels == 0], labels[labels == 0]).relabel(scan, suspect)
    with pytest.raises(ValueError, match="trusted features have width 4, the scan's 10"):
        Trusted(some[:, :4], labels).relabel(scan, suspect)
    with pytest.raises(ValueError, match=r"got \(15, 10\) and \(14,\)"):
        Trusted(some, labels[1:])
    with pytest.raises(ValueError, match=r"relabeler 'trusted': .*missing 2 required"):
        relabelers.create("trusted")
