from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from nab_defense import checkpoint, io
from nab_defense.checkpoint import Network
from nab_defense.defended import DefendedModel
from nab_defense.stamp import Stamp

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def images(count: int = 3, channels: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def defended(stamp: Stamp, name: str = "test_resnet", **knobs: Any) -> DefendedModel:
    torch.manual_seed(0)
    return DefendedModel(Network(name, 5, **knobs).build(), stamp, mean=MEAN, std=STD).eval()


@pytest.mark.parametrize("stamp", [Stamp(), Stamp.random(3), Stamp(5, "bottom_right", 0.9)])
def test_equals_the_network_on_stamped_images(stamp: Stamp) -> None:
    model, batch = defended(stamp), images()
    expected = model.model(stamp(batch, mean=MEAN, std=STD, normalized=True))
    assert torch.equal(model(batch), expected)
    assert not torch.equal(model(batch), model.model(batch))
    assert torch.equal(batch, images())


def test_the_patch_is_made_once_for_batches_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Size] = []
    fitted = Stamp.fitted
    monkeypatch.setattr(Stamp, "fitted", lambda self, image, **knobs: (made.append(image.shape), fitted(self, image, **knobs))[1])
    model = DefendedModel(nn.Identity(), Stamp.random(3), mean=MEAN, std=STD)
    kinds = [images(2), images(5, seed=1), images(2, size=64), images(2).double(), images(2)]
    with torch.inference_mode():
        shown = [model(batch) for batch in kinds]
    assert [tuple(shape) for shape in made] == [(2, 3, 32, 32), (2, 3, 64, 64), (2, 3, 32, 32), (2, 3, 32, 32)]
    for batch, stamped in zip(kinds, shown, strict=True):
        assert torch.equal(stamped, model.stamp(batch, mean=MEAN, std=STD, normalized=True))
    batch = images(2).requires_grad_(True)  # the patch was made in inference mode
    model(batch).square().sum().backward()
    assert batch.grad is not None and (batch.grad == 0).sum() == 2 * 3 * 4 and len(made) == 4 + len(kinds)


@pytest.mark.parametrize("change", ["stamp", "mean"])
def test_another_stamp_or_normalisation_is_seen_at_once(change: str) -> None:
    model = DefendedModel(nn.Identity(), Stamp.random(9), mean=(0.1, 0.2, 0.3), std=STD)
    before = model(images())
    other = DefendedModel(nn.Identity(), Stamp.random(8) if change == "stamp" else model.stamp, mean=MEAN, std=STD)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(images()), other(images())) and not torch.equal(model(images()), before)


def test_state_dict_restores_another_stamp_and_normalisation() -> None:
    first = DefendedModel(nn.Linear(2, 2), Stamp.random(9), mean=(0.1, 0.2), std=(0.3, 1 / 3))
    second = DefendedModel(nn.Linear(2, 2), Stamp(), mean=(0.5, 0.5), std=(1.0, 1.0))
    second.load_state_dict(first.state_dict())
    assert (second.stamp, second.mean, second.std) == (first.stamp, first.mean, first.std)
    assert torch.equal(second.model.weight, first.model.weight)  # type: ignore[arg-type]


def test_state_dict_survives_weights_only(tmp_path: Path) -> None:
    first, second = defended(Stamp.random(9)), defended(Stamp())
    io.save_state(tmp_path / "state", first.state_dict())
    second.load_state_dict(io.load_state(tmp_path / "state"))
    assert second.stamp == Stamp.random(9) and torch.equal(first(images()), second(images()))


def test_deepcopy_is_independent() -> None:
    model = defended(Stamp.random(2))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), model(images()))
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert twin.stamp == model.stamp and not torch.equal(twin(images()), model(images()))


@pytest.mark.parametrize("stamp", [Stamp(), Stamp.random(4)], ids=["mean", "secret"])
def test_export_keeps_the_stamp_for_any_batch(stamp: Stamp) -> None:
    model = defended(stamp)
    exported = torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for count in (1, 2, 5):
        torch.testing.assert_close(exported(images(count)), model(images(count)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("stamp", [Stamp(), Stamp.random(4), Stamp(size=3, corner="bottom_right", value=0.5)])
@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning"
)
def test_a_trace_keeps_the_stamp_for_any_batch_whatever_was_called_before(stamp: Stamp) -> None:
    for called in (False, True):
        model = defended(stamp)
        if called:
            model(images(2))
        traced = torch.jit.trace(model, images(2))
        for count in (1, 2, 5):
            torch.testing.assert_close(traced(images(count)), model(images(count)), rtol=0, atol=1e-6)


def test_images_of_two_sizes_from_two_threads_get_their_own_stamp() -> None:
    """Between the look at the patch that is there and its use another thread may put its own there."""
    model = DefendedModel(torch.nn.Identity(), Stamp(), mean=[0.3], std=[0.3])
    small, large = torch.ones(1, 1, 32, 32), torch.ones(1, 1, 160, 160)
    found, model._last = model(small), None

    class Other:
        """Compares as the kind of the small images, and puts that of the large ones in its place."""

        def __ne__(self, kind: object) -> bool:
            model._last = None
            model(large)
            return False

    patch = Stamp().fitted(small, mean=[0.3], std=[0.3], normalized=True)
    model._last = Other(), patch
    assert torch.equal(model(small), found)


def test_the_plain_network_stays_loadable_by_timm() -> None:
    model = defended(Stamp())
    plain = timm.create_model("test_resnet", num_classes=5).eval()
    plain.load_state_dict(model.model.state_dict())
    assert torch.equal(plain(images()), model.model(images()))


class CornerReader(nn.Module):
    """Class 1 where the top left pixel is bright, else 0."""

    def forward(self, batch: Tensor) -> Tensor:
        bright = (batch[:, :, 0, 0].mean(1) > 1).long()
        return nn.functional.one_hot(bright, 2).float()


def test_rejects_exactly_where_the_stamp_changes_the_class() -> None:
    batch = torch.zeros(4, 3, 32, 32)
    batch[[1, 3], :, 0, 0] = 2
    model = DefendedModel(CornerReader(), Stamp(), mean=MEAN, std=STD)
    assert model.rejects(batch).tolist() == [False, True, False, True]
    assert not DefendedModel(CornerReader(), Stamp(corner="top_right"), mean=MEAN, std=STD).rejects(batch).any()
    network = defended(Stamp.random(1))
    batch = images(16) * 3
    expected = network(batch).argmax(1) != network.model(batch).argmax(1)
    assert torch.equal(network.rejects(batch), expected) and not network.rejects(batch).requires_grad


NETWORKS = [
    (Network("test_resnet", 5), 3),
    (Network("test_vit", 5, kwargs={"img_size": 32}), 3),
    (Network("test_resnet", 4, in_chans=1, small_stem=True), 1),
    (Network("resnet10t", 2, small_stem=True), 3),
]


@pytest.mark.parametrize(("network", "channels"), NETWORKS, ids=lambda value: getattr(value, "model", None))
def test_save_and_load_is_bit_identical(network: Network, channels: int, tmp_path: Path) -> None:
    mean, std = MEAN[:channels], STD[:channels]
    model = DefendedModel(network.build(), Stamp.random(5), mean=mean, std=std)
    model.train()(images(4, channels))  # moves running statistics
    model.eval().to(memory_format=torch.channels_last)
    batch = images(2, channels)
    expected = model(batch)
    checkpoint.save(tmp_path / "model.safetensors", model, network, mean=mean, std=std, classes=["é", "b"])
    for path in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        loaded = checkpoint.load(path)
        assert isinstance(loaded, DefendedModel) and loaded.stamp == model.stamp and not loaded.training
        assert (loaded.mean, loaded.std) == (mean, std)
        assert torch.equal(loaded.to(memory_format=torch.channels_last)(batch), expected)
    assert checkpoint.read_header(tmp_path)["classes"] == ["é", "b"]


def test_small_stem_keeps_the_resolution() -> None:
    small, usual = (Network("test_resnet", 4, small_stem=small).build().eval() for small in (True, False))
    edges = [network.forward_features(images(1)).shape[-1] for network in (small, usual)]  # type: ignore[operator]
    assert edges == [4, 1]
    with pytest.raises(ValueError, match="small_stem serves timm's ResNet family, not 'test_vit'"):
        Network("test_vit", 4, small_stem=True).build()


def test_a_network_without_stamp_loads_without(tmp_path: Path) -> None:
    network = Network("test_resnet", 5)
    model = network.build().eval()
    checkpoint.save(tmp_path / "m.safetensors", model, network, mean=MEAN, std=STD)
    loaded = checkpoint.load(tmp_path / "m.safetensors")
    assert not isinstance(loaded, DefendedModel) and torch.equal(loaded(images()), model(images()))


def test_a_network_that_timm_does_not_have(tmp_path: Path) -> None:
    build = lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 2))  # noqa: E731
    model = DefendedModel(build(), Stamp(), mean=MEAN, std=STD)
    checkpoint.save(tmp_path / "m.safetensors", model, Network("mine.py:build", 2), mean=MEAN, std=STD)
    loaded = checkpoint.load(tmp_path / "m.safetensors", build)
    assert isinstance(loaded, DefendedModel) and torch.equal(loaded(images(size=8)), model(images(size=8)))
    with pytest.raises(ValueError, match=r"timm has no model 'mine.py:build'"):
        checkpoint.load(tmp_path / "m.safetensors")


def test_the_file_holds_tensors_and_json_and_no_pickle(tmp_path: Path) -> None:
    model, path = defended(Stamp.random(5)), tmp_path / "m.safetensors"
    checkpoint.save(path, model, Network("test_resnet", 5), mean=MEAN, std=STD)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    stored = header.pop("__metadata__")
    assert all(isinstance(json.loads(value), dict | list | str) for value in stored.values())
    assert set(header) == set(model.model.state_dict())
    assert len(data) == 8 + length + max(entry["data_offsets"][1] for entry in header.values())


def test_foreign_and_unfit_files_are_refused(tmp_path: Path) -> None:
    network = Network("test_resnet", 5)
    with pytest.raises(ValueError, match=r"no such file: .*model.safetensors"):
        checkpoint.load(tmp_path)
    state = network.build().state_dict()
    for metadata in (None, {"format": "pt"}, {"format": '"nab_defense 0"'}):
        safetensors.torch.save_file(state, tmp_path / "foreign.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match="was not saved by this package"):
            checkpoint.load(tmp_path / "foreign.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not at all")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        checkpoint.load(tmp_path / "broken.safetensors")
    checkpoint.save(tmp_path / "m.safetensors", network.build(), Network("test_resnet", 6), mean=MEAN, std=STD)
    with pytest.raises(ValueError, match=r"do not fit 'test_resnet'.*size mismatch") as caught:
        checkpoint.load(tmp_path / "m.safetensors")
    assert "\n" not in str(caught.value)


def test_an_unknown_network_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="timm has no model 'resnet19'; did you mean 'resnet1"):
        Network("resnet19", 2).build()
    with pytest.raises(ValueError, match=r"timm cannot build 'test_resnet': .*no_such"):
        Network("test_resnet", 2, kwargs={"no_such": 1}).build()
