"""A few samples that stand apart: accused for what no image shows by nature, and let go for what they show by chance."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nab_defense.few import few_unnatural
from nab_defense.parts import few_of_a_class
from nab_defense.runtime import Runtime
from nab_defense.scan import Scan

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


@pytest.mark.parametrize("few", [7, 8, 13, 19, 20])
def test_so_many_of_a_class_are_a_few(few: int) -> None:
    *_, seen = data(few, patch=0.0)
    found = {group.label: likely > 0.5 for group, likely in few_of_a_class(seen, NOBODY)}
    assert (0 in found) is (8 <= few < 20)
    if 0 in found:
        np.testing.assert_array_equal(found[0], np.arange(1200) < few)
    assert not any((likely > 0.5)[LABELS == 0].any() for _, likely in few_of_a_class(seen, LABELS == 0))  # accused by now
    small = (LABELS == 0) & (np.arange(1200) >= 39)
    assert not any(group.label == 0 for group, _ in few_of_a_class(seen, small))


def test_a_few_are_accused_for_a_trigger_and_not_for_content_that_they_show_by_chance() -> None:
    session, trained, seen = data(13, patch=4.0)
    ((group, likely),) = few_unnatural(session, trained, seen, NOBODY)
    np.testing.assert_array_equal(likely > 0.5, np.arange(1200) < 13)
    assert group.size == 13 and group.foreign and group.beyond is not None and group.beyond > 0.9
    session, trained, seen = data(13, patch=0.0, chance=6.0)
    assert few_unnatural(session, trained, seen, NOBODY) == []
    session, trained, seen = data(0, patch=0.0)
    assert few_unnatural(session, trained, seen, NOBODY) == []
