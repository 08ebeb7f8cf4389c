"""fit: one loop on timm's optimizers, schedulers and EMA, which a kill does not harm."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import io, ranks
from .parallel import Replica
from .registry import nearest
from .runtime import Runtime, fixed_seed

__all__ = ["TrainConfig", "build_optimizer", "fit"]

log = logging.getLogger(__name__)
OPTIMIZERS = [str(name) for name in list_optimizers()]
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "none")
FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)  # with one kernel for a whole step, on CPUs and CUDA alike
CHECK_EVERY = 50  # steps between looks at the loss, each of which waits for the device
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training; names and meanings are those of timm's train script.

    Args:
        epochs: Passes over the data.
        batch_size: Images a step.
        opt, lr, momentum, weight_decay: The optimizer, any that timm knows.
        sched, warmup_epochs, warmup_lr, min_lr: The learning rate's course, stepped after every update.
        decay_epochs, decay_milestones, decay_rate: When "step" and "multistep" lower it, and by what factor; the power of "poly".
        smoothing: Label smoothing in [0, 1).
        clip_grad: Largest gradient norm; None: no clipping.
        grad_accum_steps: Batches whose gradients add up to one update.
        model_ema, model_ema_decay: Ship a moving average of the weights, with timm's warm-up of the decay.
    """

    epochs: int = 30
    batch_size: int = 128
    opt: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    sched: str = "cosine"
    warmup_epochs: int = 0
    warmup_lr: float = 1e-5
    min_lr: float = 0.0
    decay_epochs: float = 90
    decay_milestones: tuple[int, ...] = (90, 180, 270)
    decay_rate: float = 0.1
    smoothing: float = 0.0
    clip_grad: float | None = None
    grad_accum_steps: int = 1
    model_ema: bool = False
    model_ema_decay: float = 0.9998

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "grad_accum_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {self.smoothing}")
        if self.sched not in SCHEDULES:
            raise ValueError(f"sched must be one of {', '.join(SCHEDULES)}, got {self.sched!r}")
        first = {"step": self.decay_epochs, "multistep": min(self.decay_milestones, default=math.inf)}.get(self.sched, 0)
        if first >= self.epochs:
            key = "decay_epochs" if self.sched == "step" else "decay_milestones"
            raise ValueError(f"sched={self.sched} would first lower lr after epoch {first} of {self.epochs}: set {key}")
        if self.opt.lower() not in OPTIMIZERS:
            raise ValueError(f"timm has no optimizer {self.opt!r}{nearest(self.opt, OPTIMIZERS)}")

    def shortened(self, epochs: int) -> TrainConfig:
        """The same course of the learning rate in so many epochs; itself where it has no more."""
        if self.epochs <= epochs:
            return self
        return replace(
            self,
            epochs=epochs,
            warmup_epochs=-(-self.warmup_epochs * epochs // self.epochs),  # one is not left out for being short
            decay_epochs=self.decay_epochs * epochs / self.epochs,
            decay_milestones=tuple(max(1, epoch * epochs // self.epochs) for epoch in self.decay_milestones),
        )


def fit(
    model: nn.Module,
    loader: Any,
    *,
    runtime: Runtime,
    train: TrainConfig,
    loss: Loss | None = None,
    after_epoch: Callable[[nn.Module, int], bool] | None = None,
    state: Path | None = None,
    resume: bool = False,
    split: bool = False,
    title: str = "train",
    about: str = "",
) -> list[dict[str, float]]:
    """Train a network in place.

    Each epoch draws its randomness from (runtime.seed, epoch) alone. So a run that is killed and resumed from `state`
    repeats the interrupted epoch and ends with the same weights, bit for bit on one machine.

    Args:
        model: Any timm network.
        loader: Shuffled batches of (normalised images (B, C, H, W), labels (B,)).
        runtime: Device, precision, memory format, seed.
        train: What timm's train script would be told.
        loss: (logits (B, K), labels (B,)) -> scalar; None: cross-entropy with `train.smoothing`.
        after_epoch: Called with the network and the number of finished epochs; true ends training.
        state: File that holds the training state after each epoch.
        resume: Go on from `state` where it exists.
        split: Of several ranks, each gets its part of every batch from its loader, and the mean is over the whole batch; batches
            are of one size. Otherwise they train alike, on whole batches, and end with rank 0's weights.
        title: Names the progress bar.
        about: What it is trained on; a state that says otherwise is refused.

    Returns:
        One record an epoch: epoch, loss, accuracy, lr, seconds.

    Raises:
        ValueError: The loss is not finite, the loader is empty, or `state` belongs to other settings or images.
    """
    steps = len(loader)
    if steps == 0:
        raise ValueError(f"{title}: the training set gives no batch; lower batch_size")
    if loss is None:

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(logits, labels, label_smoothing=train.smoothing)

    runtime.place(model)
    optimizer = build_optimizer(model, train, runtime)
    second_order = bool(getattr(optimizer, "is_second_order", False))
    accum = train.grad_accum_steps
    updates = -(-steps // accum)  # per epoch; a shorter last group still counts
    scheduler = _scheduler(optimizer, train, updates)
    ema = ModelEmaV3(model, decay=train.model_ema_decay, use_warmup=True) if train.model_ema else None
    settings = {"train": asdict(train), "seed": runtime.seed, "steps": steps, "about": about}
    found = ranks.same(bool(resume and state and state.exists()))
    history = _restore(state, settings, model, optimizer, ema) if state and found else []
    replica = Replica(model, runtime, split=split)
    with tqdm(
        total=train.epochs * steps, initial=len(history) * steps, desc=title, unit="batch", leave=False,
        disable=None if ranks.leads() else True,
    ) as bar:  # fmt: skip
        for epoch in range(len(history), train.epochs):
            fixed_seed(runtime.seed, epoch)
            if hasattr(optimizer, "generator"):  # that of Adahessian, which its state does not hold
                optimizer.generator = torch.Generator(next(model.parameters()).device).manual_seed(torch.initial_seed())
            model.train()
            optimizer.zero_grad()
            meter = _Meter(title, f"epoch {epoch + 1}/{train.epochs}", replica, bar)
            for step, (images, labels) in enumerate(loader):
                if step == 0:
                    replica.begin(epoch, len(labels))
                update, last = epoch * updates + step // accum, (step + 1) % accum == 0 or step + 1 == steps
                if scheduler is not None and step % accum == 0:
                    scheduler.step_update(update)
                with replica.holding(not last):
                    with runtime.autocast():
                        logits = replica.forward(runtime.put(images))
                    labels = labels.to(logits.device)
                    value = loss(logits.float(), labels)
                    (value / (min(accum, steps - step // accum * accum) / replica.weight(len(labels)))).backward(
                        create_graph=second_order
                    )
                if last:
                    if train.clip_grad is not None:
                        dispatch_clip_grad(model.parameters(), train.clip_grad)
                    optimizer.step()
                    optimizer.zero_grad()
                    if ema is not None:
                        ema.update(model, step=update + 1)
                meter.add(value, logits, labels)
                if step % CHECK_EVERY == 0 or step + 1 == steps:
                    meter.read(f"lower lr (now {train.lr}) or set clip_grad")
            replica.settle(model, *([] if ema is None else [ema.module]))
            history.append({"epoch": epoch + 1, **meter.record(), "lr": optimizer.param_groups[0]["lr"]})
            if state is not None:
                io.save_state(state, _packed(settings, model, optimizer, ema, history))
            if after_epoch is not None and ranks.same(bool(after_epoch(model, epoch + 1))):
                break
    if ema is not None:
        model.load_state_dict(ema.module.state_dict())
    return history


class _Meter:
    """Loss and accuracy of one epoch, summed on the device so that a step never waits for it."""

    def __init__(self, title: str, where: str, replica: Replica, bar: Any) -> None:
        self.title, self.where, self.replica, self.bar = title, where, replica, bar
        self.total, self.correct = torch.zeros(2, device=replica.runtime.torch_device).unbind()
        self.steps, self.count, self.loss, self.accuracy = 0, 0, 0.0, 0.0
        self.started = time.perf_counter()

    def add(self, value: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.total += value.detach() * len(labels)
        self.correct += (logits.detach().argmax(1) == labels).sum()
        self.steps += 1
        self.count += len(labels)
        self.bar.update()

    def read(self, remedy: str) -> None:
        """Fetch the sums, show them, and refuse a loss that is not finite."""
        total, correct, count = self.replica.total(float(self.total), float(self.correct), self.count)
        self.loss, self.accuracy = total / count, correct / count
        if not math.isfinite(self.loss):
            raise ValueError(f"{self.title}: the loss is {self.loss} in {self.where}, step {self.steps}; {remedy}")
        rate = count / max(time.perf_counter() - self.started, 1e-9)
        self.bar.set_postfix_str(f"{self.where} loss {self.loss:.3f} acc {self.accuracy:.3f} {rate:.0f} img/s", refresh=False)

    def record(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.started
        log.info("%s: %s loss %.3f acc %.3f in %.1f s", self.title, self.where, self.loss, self.accuracy, seconds)
        return {"loss": self.loss, "accuracy": self.accuracy, "seconds": seconds}


def build_optimizer(model: nn.Module, train: TrainConfig, runtime: Runtime) -> Any:
    """timm's optimizer. Fused where torch has it so: one pass over the weights in place of several.

    Raises:
        ValueError: It cannot be built here: some need CUDA, or a package of their own."""
    given: dict[str, Any] = {"lr": train.lr, "weight_decay": train.weight_decay, "momentum": train.momentum}
    try:
        known = get_optimizer_class(train.opt.lower(), bind_defaults=False) in FUSED
        if known and runtime.torch_device.type in ("cpu", "cuda"):
            given["fused"] = True
        return create_optimizer_v2(model, opt=train.opt, **given)
    except (AssertionError, ImportError, RuntimeError, TypeError) as error:
        raise ValueError(f"the optimizer {train.opt!r} cannot be used: {' '.join(str(error).split())[:200]}") from error


def _scheduler(optimizer: Any, train: TrainConfig, updates: int) -> Any:
    if train.sched == "none":
        return None
    warmup = min(train.warmup_epochs, train.epochs - 1)
    if warmup < train.warmup_epochs:
        log.warning("warmup_epochs=%s are cut to %d: there are %d epochs", train.warmup_epochs, warmup, train.epochs)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=train.sched,
        num_epochs=train.epochs,
        warmup_epochs=warmup,
        warmup_lr=train.warmup_lr,
        min_lr=train.min_lr,
        decay_epochs=train.decay_epochs,
        decay_milestones=sorted(train.decay_milestones),
        decay_rate=train.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    return scheduler


def _packed(
    settings: dict[str, Any], model: nn.Module, optimizer: Any, ema: Any, history: list[dict[str, float]]
) -> dict[str, Any]:
    average = None if ema is None else ema.module.state_dict()
    return {
        "settings": settings,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": average,
        "history": history,
    }


def _restore(state: Path, settings: dict[str, Any], model: nn.Module, optimizer: Any, ema: Any) -> list[dict[str, float]]:
    saved = io.load_state(state)
    if saved["settings"] != settings:
        raise ValueError(
            f"{state} was left by a run with other settings or images; use another --out, or start again without --resume"
        )
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    if ema is not None:
        ema.module.load_state_dict(saved["ema"])
    history: list[dict[str, float]] = saved["history"]
    log.info("resumed after epoch %d", len(history))
    return history
