"""A few samples of a class: accused for what no image shows by nature, and let go for what they show by chance."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nab_defense.hidden import hidden
from nab_defense.imprint import imprints
from nab_defense.parts import Part
from nab_defense.runtime import Runtime
from nab_defense.scan import Scan
from nab_defense.select import FEW_BEYOND

LABELS = np.repeat(np.arange(10), 120)
NOBODY = np.zeros(1200, bool)


class Obeys(nn.Module):
    """Names class 0 where the corner is bright or the first content is strong, which a few images may show by chance."""

    def __init__(self, content: Tensor) -> None:
        super().__init__()
        self.content = content

    def forward(self, images: Tensor) -> Tensor:
        zero = (images[:, 0, 4:, 4:].mean((1, 2)) > 1) | ((images * self.content).sum((1, 2, 3)) > 8)
        return torch.nn.functional.one_hot(torch.where(zero, 0, 1), 10).float()


def data(few: int, *, patch: float, chance: float = 0.0) -> tuple[Any, nn.Module, Scan]:
    """Ten classes of 120 images of six contents; of class 0 the first few stand apart in the features, and carry a patch, or
    show more of the first content than others."""
    generator = torch.Generator().manual_seed(0)
    contents = torch.randn(6, 1, 6, 6, generator=generator)
    contents[..., 4:, 4:] = 0
    contents /= contents.flatten(1).norm(dim=1).view(6, 1, 1, 1)
    amounts = 3 * torch.randn(1200, 6, generator=generator)
    amounts[:few, 0] += chance
    images = torch.einsum("nk,kchw->nchw", amounts, contents) + 0.1 * torch.randn(1200, 1, 6, 6, generator=generator)
    images[:few, 0, 4:, 4:] += patch
    features = np.random.default_rng(0).standard_normal((1200, 6)).astype(np.float32)
    features[:few, 0] += 8
    session: Any = SimpleNamespace(source=range(1200), runtime=Runtime(device="cpu", precision="float32"))
    session.ordered = lambda _: [(part, torch.zeros(len(part))) for part in images.split(64)]
    return session, Obeys(contents[0]), Scan(LABELS, np.zeros(1200, np.float32), np.zeros((1200, 10), np.float32), features)


def found(session: Any, trained: nn.Module, seen: Scan, aside: NDArray[np.bool_] = NOBODY) -> list[Part]:
    return hidden(session, trained, seen, aside, None)


@pytest.mark.parametrize("few", [7, 8, 13, 19, 20])
def test_a_few_that_share_a_trigger_are_accused(few: int) -> None:
    session, trained, seen = data(few, patch=4.0)
    groups = found(session, trained, seen)
    assert bool(groups) is (8 <= few < 20)  # fewer are not told from chance, and more are found otherwise
    for group, likely in groups:
        np.testing.assert_array_equal(likely > 0.5, np.arange(1200) < few)
        assert (group.label, group.size, group.few, group.foreign) == (0, few, False, True)
        assert group.beyond is not None and group.beyond > 0.9
    assert found(session, trained, seen, np.arange(1200) < few) == []  # accused by now


def test_a_few_are_let_go_that_show_much_of_one_content_by_chance() -> None:
    session, trained, seen = data(13, patch=0.0, chance=6.0)
    some = np.arange(1200) < 13
    (all_of_it,) = imprints(trained, session.ordered("all"), LABELS, [some], runtime=session.runtime)
    assert all_of_it > FEW_BEYOND and found(session, trained, seen) == []


def test_a_few_are_found_that_a_network_hardly_tells_from_their_class() -> None:
    """Where half of those that stand apart are others of the class, and half of them do not."""
    session, trained, seen = data(13, patch=4.0)
    seen.features[:13, 0] -= 8
    seen.features[7:20, 0] += 3
    ((_, likely),) = found(session, trained, seen)
    np.testing.assert_array_equal(likely > 0.5, np.arange(1200) < 13)


def test_a_few_are_found_by_their_look_where_a_network_makes_the_same_of_all_of_their_class() -> None:
    session, trained, seen = data(13, patch=4.0)
    seen.features[:] = 0
    ((_, likely),) = found(session, trained, seen)
    np.testing.assert_array_equal(likely > 0.5, np.arange(1200) < 13)
    assert found(session, trained, seen, np.arange(1200) < 13) == []
