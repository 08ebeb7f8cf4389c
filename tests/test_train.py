from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nab_defense.data import build_loader, build_transform, open_source
from nab_defense.runtime import Runtime
from nab_defense.train import TrainConfig, fit

CPU = Runtime(device="cpu", precision="float32", seed=3)
State = dict[str, Tensor]


class Interrupted(Exception):
    """What the tests stop a training with."""


class Toy:
    """40 points of two classes, shuffled anew each epoch; stops before batch `stop`, counted over epochs, if told."""

    def __init__(self, batch: int = 8, stop: int | None = None, kill: bool = False) -> None:
        self.batch, self.stop, self.kill, self.seen = batch, stop, kill, 0
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(40) % 2
        self.images = torch.randn(40, 3, 8, 8, generator=generator) + 0.5 * (2 * self.labels - 1).view(-1, 1, 1, 1)

    def __len__(self) -> int:
        return 40 // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(40).split(self.batch):
            if self.seen == self.stop:
                if self.kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise Interrupted
            self.seen += 1
            yield self.images[chosen], self.labels[chosen]


def network(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(0.2 if norm else 0), nn.Flatten(),
        nn.Linear(144, 2),
    )  # fmt: skip


def vit() -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = timm.create_model("test_vit", num_classes=2, img_size=8, patch_size=4, drop_rate=0.2, drop_path_rate=0.3)
    return made


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"epochs": 4, "batch_size": 8, "lr": 0.05, **changes})


def test_loss_falls_on_a_toy_problem() -> None:
    history = fit(network(), Toy(), runtime=CPU, train=config(epochs=8))
    assert [record["epoch"] for record in history] == list(range(1, 9))
    assert history[-1]["loss"] < 0.1 < 0.3 < history[0]["loss"] and history[-1]["accuracy"] > 0.95
    assert all(record["seconds"] > 0 for record in history)


def test_the_first_loss_and_accuracy_are_those_of_the_network() -> None:
    toy, model = Toy(batch=40), network(norm=False)
    logits = model(toy.images)
    expected = F.cross_entropy(logits, toy.labels, label_smoothing=0.1).item()
    accuracy = (logits.argmax(1) == toy.labels).float().mean().item()
    history = fit(model, toy, runtime=CPU, train=config(epochs=1, smoothing=0.1))
    assert history[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert history[0]["accuracy"] == pytest.approx(accuracy)


def test_one_step_of_sgd_is_lr_times_the_gradient_of_the_given_loss() -> None:
    toy, model = Toy(batch=40), network(norm=False)
    before = [p.detach().clone() for p in model.parameters()]
    squared = lambda logits, labels: (logits[:, 0] - labels).square().mean()  # noqa: E731
    gradients = torch.autograd.grad(squared(model(toy.images), toy.labels), list(model.parameters()))
    fit(model, toy, runtime=CPU, train=config(epochs=1, opt="momentum", weight_decay=0.0), loss=squared)
    for old, gradient, new in zip(before, gradients, model.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.05 * gradient, rtol=1e-4, atol=1e-6)


def test_the_seed_decides() -> None:
    runs = []
    for seed in (3, 3, 4):
        model = network()
        fit(model, Toy(), runtime=Runtime(device="cpu", precision="float32", seed=seed), train=config())
        runs.append(model)
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


CASES = {
    "plain": (network, {}),
    "ema": (network, {"model_ema": True, "model_ema_decay": 0.8}),
    "accumulation and clipping": (network, {"grad_accum_steps": 2, "clip_grad": 0.1}),
    "adamw on a transformer that drops paths": (vit, {"opt": "adamw", "lr": 1e-3, "warmup_epochs": 1, "model_ema": True}),
}


@pytest.mark.parametrize("stop", [7, 15], ids=["in mid-epoch", "after an epoch"])
@pytest.mark.parametrize("case", CASES)
def test_interrupted_and_resumed_equals_uninterrupted(case: str, stop: int, tmp_path: Path) -> None:
    build, changes = CASES[case]
    straight, halted, resumed = build(), build(), build()
    expected = fit(straight, Toy(), runtime=CPU, train=config(**changes))
    state = tmp_path / "state"
    with pytest.raises(Interrupted):
        fit(halted, Toy(stop=stop), runtime=CPU, train=config(**changes), state=state, resume=True)
    history = fit(resumed, Toy(), runtime=CPU, train=config(**changes), state=state, resume=True)
    assert same(resumed, straight) and not same(halted, straight)
    keys = ("epoch", "loss", "accuracy", "lr")
    assert [[record[key] for key in keys] for record in history] == [[record[key] for key in keys] for record in expected]
    finished = build()
    fit(finished, Toy(stop=0), runtime=CPU, train=config(**changes), state=state, resume=True)
    assert same(finished, straight)


def test_without_resume_a_state_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"broken")
    model, other = network(), network()
    fit(model, Toy(), runtime=CPU, train=config(epochs=1), state=tmp_path / "state")
    fit(other, Toy(), runtime=CPU, train=config(epochs=1))
    assert same(model, other) and [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_with_augmentation_in_timms_loader(workers: int, tmp_path: Path) -> None:
    source = open_source("digits").subset(range(48))
    runtime = Runtime(device="cpu", precision="float32", workers=workers)
    state = tmp_path / "state"

    def run(stop_after: int | None, resume: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        loader = build_loader(
            source.view(), build_transform("crop_flip", 8, hflip=0.5), size=8, batch_size=16, mean=(0.5,), std=(0.5,),
            runtime=runtime, training=True,
        )  # fmt: skip

        def stop(model: nn.Module, epoch: int) -> bool:
            if epoch == stop_after:
                raise Interrupted
            return False

        left = state if resume else None
        fit(model, loader, runtime=runtime, train=config(epochs=3), state=left, resume=resume, after_epoch=stop)
        return model

    straight = run(None, False)
    with pytest.raises(Interrupted):
        run(1, True)
    assert same(run(None, True), straight)


def test_a_killed_process_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    straight, resumed, state = network(), network(), tmp_path / "state"
    fit(straight, Toy(), runtime=CPU, train=config(model_ema=True))
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, __file__, str(state)], env={**os.environ, **threads}, timeout=300)  # see below
    assert killed.returncode == -signal.SIGKILL
    history = fit(resumed, Toy(stop=10), runtime=CPU, train=config(model_ema=True), state=state, resume=True)
    assert len(history) == 4 and same(resumed, straight)  # two epochs, ten batches, were left


@pytest.mark.parametrize(("batch", "steps"), [(10, 4), (20, 8)])  # the second group is shorter than asked for
def test_accumulated_batches_equal_one_big_batch(batch: int, steps: int) -> None:
    small, big = network(norm=False), network(norm=False)
    fit(small, Toy(batch=batch), runtime=CPU, train=config(epochs=3, grad_accum_steps=steps))
    fit(big, Toy(batch=40), runtime=CPU, train=config(epochs=3))
    for a, b in zip(small.parameters(), big.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_update() -> None:
    model = network(norm=False)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    fit(model, Toy(batch=40), runtime=CPU, train=config(epochs=1, opt="momentum", lr=1.0, clip_grad=0.01, weight_decay=0.0))
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_ema_weights_are_shipped() -> None:
    weights: list[Tensor] = []

    def look(model: nn.Module, epoch: int) -> bool:
        weights.append(next(model.parameters()).detach().clone())
        return False

    model = network()
    fit(model, Toy(batch=40), runtime=CPU, train=config(epochs=8, model_ema=True, model_ema_decay=0.6), after_epoch=look)
    average = weights[0]
    for step, weight in enumerate(weights):
        decay = min(0.6, 1 - (1 + step) ** (-2 / 3))  # timm's warm-up
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(next(model.parameters()).detach(), average)
    assert not torch.allclose(average, weights[-1], atol=1e-4)


def test_a_loss_that_is_not_finite_names_epoch_and_step() -> None:
    toy = Toy()
    toy.images[:] = float("inf")
    with pytest.raises(ValueError, match=r"scan: the loss is nan in epoch 1/., step 1; lower lr \(now 0.05\) or set clip_grad"):
        fit(network(), toy, runtime=CPU, train=config(), title="scan")
    calls = iter(range(1000))
    late = lambda logits, labels: logits.sum() * (float("nan") if next(calls) == 7 else 0)  # noqa: E731
    with pytest.raises(ValueError, match=r"epoch 2/., step 5"):  # looked at after the epoch's last step
        fit(network(), Toy(), runtime=CPU, train=config(), loss=late)


def test_resume_with_other_settings_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    fit(network(), Toy(), runtime=CPU, train=config(epochs=1), state=state)
    for loader, runtime, train, about in (
        (Toy(), CPU, config(epochs=2), ""),
        (Toy(batch=4), CPU, config(epochs=1), ""),
        (Toy(), Runtime(device="cpu", precision="float32", seed=4), config(epochs=1), ""),
        (Toy(), CPU, config(epochs=1), "other images"),
    ):
        with pytest.raises(ValueError, match="was left by a run with other settings"):
            fit(network(), loader, runtime=runtime, train=train, state=state, resume=True, about=about)


def test_after_epoch_stops() -> None:
    epochs: list[int] = []

    def third(model: nn.Module, epoch: int) -> bool:
        epochs.append(epoch)
        return epoch == 3

    assert len(fit(network(), Toy(), runtime=CPU, train=config(epochs=9), after_epoch=third)) == 3 and epochs == [1, 2, 3]


def test_an_empty_loader_is_refused() -> None:
    with pytest.raises(ValueError, match="train: the training set gives no batch; lower batch_size"):
        fit(network(), [], runtime=CPU, train=config())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opt": "agamw"}, "timm has no optimizer 'agamw'; did you mean 'adamw'"),
        ({"sched": "cosin"}, "sched must be one of cosine, .*, got 'cosin'"),
        ({"sched": "step"}, "sched=step would first lower lr after epoch 90 of 30: set decay_epochs"),
        ({"sched": "multistep", "decay_milestones": (40, 30)}, "after epoch 30 of 30: set decay_milestones"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"grad_accum_steps": 0}, "grad_accum_steps must be at least 1"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_settings_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


if __name__ == "__main__":  # kills itself in the middle of the third epoch
    fit(network(), Toy(stop=12, kill=True), runtime=CPU, train=config(model_ema=True), state=Path(sys.argv[1]))
