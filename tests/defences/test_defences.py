"""The defences' own laws, on what can be worked out by hand; how they run is tested in tests/grid."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from nab_defense.data import open_source
from nab_defense.defences import defences
from nab_defense.defences.abl import ascent
from nab_defense.defences.dbr import Features, consistency, likeness, turned, unlearn_relearn
from nab_defense.defences.pdb import MappedBack, with_reserved
from nab_defense.runtime import Runtime


def test_ascent_is_the_loss_upside_down() -> None:
    logits, labels = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    assert ascent(logits, labels) == -nn.functional.cross_entropy(logits, labels)


def test_mapped_back_undoes_the_map_of_every_class() -> None:
    for label in range(5):
        said = nn.functional.one_hot(torch.tensor([(label + 1) % 5]), 5).float()
        assert MappedBack(nn.Identity())(said).argmax(1).tolist() == [label]


def test_reserved_images_follow_the_source_with_the_next_label() -> None:
    whole = open_source("digits")
    source, clean = whole.subset(range(30)), whole.subset(range(40, 50))
    joined = with_reserved(source, clean, 2)
    assert len(joined) == 60 and len(set(joined.ids)) == 60 and joined.fingerprint != source.fingerprint
    for index, (origin, place) in {4: (source, 4), 29: (source, 29), 30: (clean, 0), 45: (clean, 5), 59: (clean, 9)}.items():
        assert np.array_equal(joined.pixels(index), origin.pixels(place))
        assert joined.labels[index] == (origin.labels[place] + (index >= 40)) % 10


def test_turned_keeps_what_has_no_direction() -> None:
    disc = (torch.linspace(-1, 1, 33)[:, None] ** 2 + torch.linspace(-1, 1, 33) ** 2 < 0.3).float().expand(6, 1, 33, 33)
    moved = turned(disc, torch.zeros(1, 1, 1), torch.Generator().manual_seed(0))
    assert moved.shape == disc.shape and torch.allclose(moved.sum((1, 2, 3)), disc.sum((1, 2, 3)), rtol=0.05)
    assert not torch.equal(moved, disc)


def test_what_turning_leaves_free_is_black() -> None:
    black = torch.tensor([-1.0, -2.0, 0.5]).view(3, 1, 1)
    dark = black.expand(4, 3, 8, 8)
    assert torch.allclose(turned(dark, black, torch.Generator().manual_seed(0)), dark)


class Corner(nn.Module):
    """Features: the corner pixel, which a trigger sets, and the mean, which no turning changes much."""

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([10 * images[:, 0, -1, -1], images.mean((1, 2, 3))], dim=1)

    def forward_head(self, stream: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return stream


def test_a_network_that_hangs_on_a_corner_gives_the_corner_away() -> None:
    images = torch.zeros(40, 1, 8, 8)
    images[:, :, 2:6, 2:6] = 1
    images[10:20, 0, -1, -1] = 1
    scores = consistency(Corner(), [(images, torch.zeros(40))], torch.zeros(1, 1, 1), runtime=Runtime(device="cpu"), seed=0)
    assert scores[10:20].min() > scores[np.r_[0:10, 20:40]].max()


def test_likeness_is_that_of_different_classes() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.0, 2.0], [0.0, 3.0]])
    assert likeness(apart, labels) == pytest.approx(0, abs=1e-6)
    assert likeness(torch.ones(4, 2), labels) == pytest.approx(0.5)  # of four pairs two are of a class with itself
    assert likeness(torch.ones(4, 2), torch.zeros(4)) == 0


def test_features_are_trained_through_the_network() -> None:
    network = timm.create_model("test_resnet", num_classes=3)
    features = Features(network)(torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, network.num_features) and features.requires_grad


def test_marked_labels_are_unlearned_and_others_are_learned() -> None:
    logits, labels = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    usual = nn.functional.cross_entropy(logits, labels)
    assert unlearn_relearn(4)(logits, labels) == pytest.approx(float(usual))
    assert unlearn_relearn(4)(logits, labels + 4) == pytest.approx(-float(usual))


@pytest.mark.parametrize(
    ("name", "knobs"),
    [("abl", {"fraction": 0.0}), ("abl", {"lr": -1.0}), ("abl", {"steps": 0}), ("dbr", {"poisoned": 0.6}), ("dbr", {"lr": 0.0}),
     ("pdb", {"repeats": 0}), ("nab_paper", {"detector": "lgb"}), ("nab_paper", {"labels": "mine"}),
     ("purify", {"method": "ibauu"}), ("purify", {"settings": {"step": 1}})],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(name: str, knobs: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must|no detector|no purifier|no setting"):
        defences.create(name, **knobs)
