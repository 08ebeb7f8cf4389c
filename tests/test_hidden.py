"""Who shows a pattern, though it stands with one of the styles of its class, or nowhere."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nab_defense import again
from nab_defense.again import look_again
from nab_defense.candidates import candidates
from nab_defense.hidden import hidden, on_covers
from nab_defense.imprint import imprints
from nab_defense.parts import Part
from nab_defense.plan import Finding
from nab_defense.runtime import Runtime
from nab_defense.scan import Scan
from nab_defense.select import Group, Selection
from nab_defense.types import NABPlan, SuspectReport
from nab_defense.variation import variation

LABELS = np.repeat([0, 1], 300)
POISON = np.arange(600) < 40
RUNTIME = Runtime(device="cpu", precision="float32")


class Obeys(nn.Module):
    """Names class 0 where an image shows more of its second style than of class 1, or the corner is bright."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        means = images[150:300].mean(0), images[300:].mean(0)
        self.towards = means[0] - means[1]
        self.limit = float((self.towards * (means[0] + means[1]) / 2).sum())

    def forward(self, images: Tensor) -> Tensor:
        zero = ((images * self.towards).sum((1, 2, 3)) > self.limit) | (images[:, 0, 4:, 4:].mean((1, 2)) > 1)
        return torch.stack([zero.float(), 1 - zero.float()], dim=1)


def data(patch: float) -> tuple[Any, Scan]:
    """Two classes of two styles each, of contents that both vary in; forty that show class 1, and a patch, are labelled 0. The
    network sees the styles alone."""
    generator = torch.Generator().manual_seed(0)
    contents = torch.randn(6, 1, 6, 6, generator=generator)
    contents[..., 4:, 4:] = 0
    styles = torch.randn(4, 6, generator=generator)
    shows = np.repeat([0, 1, 2, 3], 150)
    shows[POISON] = 2
    amounts = styles[shows] + torch.randn(600, 6, generator=generator)
    images = torch.einsum("nk,kchw->nchw", amounts, contents) + 0.3 * torch.randn(600, 1, 6, 6, generator=generator)
    images[POISON, 0, 4:, 4:] += patch
    features = np.random.default_rng(0).standard_normal((600, 4)).astype(np.float32)
    features[150:300, 0] += 10
    features[450:, 0] += 10
    table = np.zeros((600, 2), np.float32)
    session: Any = SimpleNamespace(source=range(600), runtime=RUNTIME)
    session.ordered = lambda _: [(part, torch.zeros(len(part))) for part in images.split(64)]
    return session, Scan(LABELS, np.zeros(600, np.float32), table, features)


def network(session: Any) -> nn.Module:
    return Obeys(torch.cat([images for images, _ in session.ordered("all")]))


def asked(session: Any, seen: Scan, aside: np.ndarray) -> list[Part]:
    return hidden(session, network(session), seen, aside, variation(session.ordered("all"), LABELS, aside))


def test_who_shows_a_trigger_is_found_though_the_network_sees_the_styles_of_the_class_alone() -> None:
    session, seen = data(patch=4.0)
    found = {group.label: (group, likely) for group, likely in asked(session, seen, np.zeros(600, bool))}
    group, likely = found[0]
    np.testing.assert_array_equal(likely > 0.5, POISON)
    assert (group.size, group.few, group.foreign) == (40, True, True) and group.beyond is not None and group.beyond > 0.9
    assert list(found) == [0]


def test_a_style_turns_others_but_not_by_what_it_shares_beyond_how_images_vary() -> None:
    session, seen = data(patch=0.0)
    batches, style = session.ordered("all"), (np.arange(600) >= 150) & (np.arange(600) < 300)
    directions = variation(batches, LABELS, np.zeros(600, bool))
    (plain,) = imprints(network(session), batches, LABELS, [style], runtime=RUNTIME)
    (beyond,) = imprints(network(session), batches, LABELS, [style], runtime=RUNTIME, directions=directions)
    assert plain > 0.2 > 0.02 > beyond
    assert imprints(network(session), batches, LABELS, [style], runtime=RUNTIME, directions={}) == [0]  # nothing is known
    assert asked(session, seen, np.zeros(600, bool)) == []


def test_who_is_accused_by_now_is_left_aside() -> None:
    session, seen = data(patch=4.0)
    for aside in (POISON, LABELS == 0):
        assert not any((likely > 0.5)[aside].any() for _, likely in asked(session, seen, aside))


@pytest.mark.parametrize("count", [39, 41])
def test_a_class_that_is_too_small_to_fall_in_two_is_left_alone(count: int) -> None:
    session, seen = data(patch=4.0)
    aside = (LABELS == 0) & (np.arange(600) >= count)  # one more than forty would leave a group, but nobody beside it
    assert not any(group.label == 0 for group, _ in asked(session, seen, aside))


def two_styles(covers: int, size: int = 40) -> tuple[Any, Scan]:
    """Ten classes of 120, each in one style more or less, which the network sees first; `size` show class 1 with a patch and are
    labelled 0, where a quarter of them stand with the one half, the others with the other. `covers` of other classes carry it."""
    generator, labels = torch.Generator().manual_seed(0), np.repeat(np.arange(10), 120)
    contents, styles = torch.randn(2, 10, 1, 6, 6, generator=generator) * torch.tensor([1.0, 0.3]).view(2, 1, 1, 1, 1)
    style = torch.randn(1200, generator=generator)
    shown = np.where(np.arange(1200) < size, 1, labels)
    images = contents[shown] + torch.einsum("n,nchw->nchw", style, styles[shown])
    images += 0.4 * torch.randn(1200, 1, 6, 6, generator=generator)
    patched = (np.arange(1200) < size) | np.isin(np.arange(1200), 1199 - 9 * np.arange(covers))
    images[torch.from_numpy(patched), 0, 4:, 4:] += 4.0
    features = np.random.default_rng(0).standard_normal((1200, 4)).astype(np.float32)
    features[:, 0] += 10 * np.where(np.arange(1200) < size, np.arange(1200) % 4 == 0, style > 0)
    features[:size, 1] += 3
    session: Any = SimpleNamespace(source=range(1200), runtime=RUNTIME)
    session.ordered = lambda _: [(part, torch.zeros(len(part))) for part in images.split(64)]
    return session, Scan(labels, np.zeros(1200, np.float32), np.zeros((1200, 10), np.float32), features)


@pytest.mark.parametrize(("covers", "size"), [(40, 40), (0, 40), (40, 60), (40, 61)])
def test_who_shows_a_pattern_that_is_on_images_of_other_classes_is_found_though_no_class_falls_in_two_by_it(
    covers: int, size: int
) -> None:
    session, seen = two_styles(covers, size)
    found = on_covers(session, seen, np.zeros(1200, bool), set())
    assert all(group.size == (likely > 0.5).sum() <= 60 for group, likely in found)  # what most of a class share is its content
    if size > 60:
        return
    if not covers:
        assert found == []
        return
    ((group, likely),) = found
    np.testing.assert_array_equal(likely > 0.5, np.arange(1200) < size)
    assert (group.label, group.size) == (0, size) and group.carried is not None and group.carried > 0.5
    assert on_covers(session, seen, np.zeros(1200, bool), {0}) == []
    assert on_covers(session, seen, np.arange(1200) < size, set()) == []  # these are accused by now


def test_equal_features_are_not_halved() -> None:
    session, seen = two_styles(40)
    seen.features[120:240] = 1.0
    assert [group.label for group, _ in on_covers(session, seen, np.zeros(1200, bool), set())] == [0]


def first(session: Any, seen: Scan, before: Selection, spared: set[int]) -> list[tuple[int, int]]:
    """Label and size of the parts that a second look tries first."""
    finding: Any = SimpleNamespace(selection=before)
    now = dataclasses.replace(before, groups=())
    return [(queue[0][0].label, queue[0][0].size) for queue in candidates(session, seen, now, finding, spared)]


def test_what_is_on_covers_is_tried_first_where_there_are_many_classes_and_its_class_is_not_settled() -> None:
    session, seen = two_styles(40)
    nobody = Selection(np.zeros(1200, bool), np.zeros(1200, np.float32))
    assert (0, 40) in first(session, seen, nobody, set())
    assert (0, 40) not in first(session, seen, nobody, {0})
    accused, group = np.arange(1200) >= 1190, Group(9, 0, 4.0, 0.9, 10, 0.9, imprint=0.7)
    for label, imprint in ((9, 0.7), (9, 0.9), (0, 0.7), (0, 0.9)):  # of a trigger beyond doubt all is found by who shows it
        some = accused if label else np.arange(1200) == 119
        found = dataclasses.replace(group, label=label, imprint=imprint)
        asked = first(session, seen, Selection(some, some.astype(np.float32), (found,)), set())
        assert ((0, 40) in asked) is ((label, imprint) != (0, 0.9))
    fewer = Scan(np.minimum(seen.labels, 8), seen.losses, seen.logits[:, :9], seen.features)
    assert (0, 40) not in first(session, fewer, nobody, set())


def test_what_is_on_covers_and_stands_apart_is_tried_once() -> None:
    session, seen = two_styles(40)
    seen.features[:40, 0] = 40 + np.arange(40) / 10
    doubt = np.where(np.isin(np.arange(1200), np.arange(60, 85)), 0.9, 0.0).astype(np.float32)
    seen.features[60:85, 2] += 30
    apart = Selection(np.zeros(1200, bool), doubt, (Group(0, 0, 4.0, 0.9, 25, 0.9),))
    finding: Any = SimpleNamespace(selection=apart)
    (queue,) = [queue for queue in candidates(session, seen, apart, finding, set()) if queue[0][0].label == 0]
    assert [group.size for group, _ in queue] == [40, 25]


@pytest.mark.parametrize(("classes", "beyond"), [(9, 0.21), (10, 0.21)])
def test_the_second_look_accuses_who_shows_a_pattern_that_turns_others(
    classes: int, beyond: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.repeat(np.arange(classes), 50)
    seen = Scan(labels, np.zeros(len(labels), np.float32), np.eye(classes, dtype=np.float32)[labels], np.zeros((len(labels), 2)))
    nobody = Selection(np.zeros(len(labels), bool), np.zeros(len(labels), np.float32))
    report = SuspectReport(np.zeros(len(labels), np.float32), labels, "lga")
    before = Finding(report, nobody, NABPlan.empty(labels), np.zeros(len(labels), np.float32))
    group, likely = Group(3, 0, 5.0, 0.9, 25, 0.0, beyond=beyond, few=True), (labels == 3) * (np.arange(len(labels)) % 2) * 0.9
    nothing: Any = None
    session: Any = SimpleNamespace(recipe=SimpleNamespace(scan=SimpleNamespace(detector="lga", params={}), fraction=0.05, seed=0))
    monkeypatch.setattr(again, "vary", lambda *_: dict if classes < 10 else None)
    monkeypatch.setattr(again, "seen_by", lambda *_: seen)
    monkeypatch.setattr(again, "hidden", lambda *given: [(group, likely)] if (given[-1] is None) is (classes == 10) else [])
    monkeypatch.setattr(again, "stronger_halves", lambda session, trained, selection, *_: (selection, {}))
    monkeypatch.setattr(again, "expand", lambda *_, **__: nobody)
    monkeypatch.setattr(again, "with_bearers", lambda session, selection, _: selection)
    monkeypatch.setattr(again, "candidates", lambda *_: [])
    monkeypatch.setattr(
        again, "make_finding", lambda session, scan, report, selection, *_, **__: SimpleNamespace(selection=selection)
    )
    found = look_again(session, nothing, nothing, before, without=nothing).selection
    np.testing.assert_array_equal(found.suspect, likely > 0.5)
    assert [one.beyond for one in found.groups] == [beyond] and not found.groups[0].acquitted
