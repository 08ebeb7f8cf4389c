"""fit: one loop on timm's optimizers, schedulers and EMA, which a kill does not harm."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import io
from .registry import nearest
from .runtime import Runtime, fixed_seed

__all__ = ["TrainConfig", "fit"]

log = logging.getLogger(__name__)
OPTIMIZERS = [str(name) for name in list_optimizers()]
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "none")
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
        if self.opt.lower() not in OPTIMIZERS:
            raise ValueError(f"timm has no optimizer {self.opt!r}{nearest(self.opt, OPTIMIZERS)}")


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
    title: str = "train",
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
        title: Names the progress bar.

    Returns:
        One record an epoch: epoch, loss, accuracy, lr, seconds.

    Raises:
        ValueError: The loss is not finite, the loader is empty, or `state` belongs to other settings.
    """
    steps = len(loader)
    if steps == 0:
        raise ValueError(f"{title}: the training set gives no batch; lower batch_size")
    if loss is None:

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(logits, labels, label_smoothing=train.smoothing)

    runtime.place(model)
    optimizer = create_optimizer_v2(model, opt=train.opt, lr=train.lr, weight_decay=train.weight_decay, momentum=train.momentum)
    updates = -(-steps // train.grad_accum_steps)  # per epoch; a shorter last group still counts
    scheduler = _scheduler(optimizer, train, updates)
    ema = ModelEmaV3(model, decay=train.model_ema_decay, use_warmup=True) if train.model_ema else None
    settings = {"train": asdict(train), "seed": runtime.seed, "steps": steps}
    history = _restore(state, settings, model, optimizer, ema) if resume and state and state.exists() else []
    forward = torch.compile(model) if runtime.compile else model
    bar = tqdm(total=train.epochs * steps, initial=len(history) * steps, desc=title, unit="batch", disable=None, leave=False)
    for epoch in range(len(history), train.epochs):
        fixed_seed(runtime.seed, epoch)
        model.train()
        started, total, hits, count = time.perf_counter(), torch.zeros((), device=runtime.torch_device), 0.0, 0
        correct = torch.zeros((), device=runtime.torch_device)
        optimizer.zero_grad()
        for step, (images, labels) in enumerate(loader):
            if scheduler is not None and step % train.grad_accum_steps == 0:
                scheduler.step_update(epoch * updates + step // train.grad_accum_steps)
            with runtime.autocast():
                logits = forward(runtime.put(images))
            labels = labels.to(logits.device)
            value = loss(logits.float(), labels)
            group = min(train.grad_accum_steps, steps - step // train.grad_accum_steps * train.grad_accum_steps)
            (value / group).backward()
            if (step + 1) % train.grad_accum_steps == 0 or step + 1 == steps:
                if train.clip_grad is not None:
                    dispatch_clip_grad(model.parameters(), train.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
                if ema is not None:
                    ema.update(model, step=epoch * updates + step // train.grad_accum_steps)
            total += value.detach() * len(labels)
            correct += (logits.detach().argmax(1) == labels).sum()
            count += len(labels)
            bar.update()
            if step % CHECK_EVERY == 0 or step + 1 == steps:
                mean, hits = float(total) / count, float(correct) / count
                if not torch.isfinite(torch.tensor(mean)):
                    bar.close()
                    where = f"epoch {epoch + 1}, step {step + 1}"
                    raise ValueError(f"{title}: the loss is {mean} in {where}; lower lr (now {train.lr}) or set clip_grad")
                rate = count / max(time.perf_counter() - started, 1e-9)
                bar.set_postfix_str(
                    f"epoch {epoch + 1}/{train.epochs} loss {mean:.3f} acc {hits:.3f} {rate:.0f} img/s", refresh=False
                )
        seconds = time.perf_counter() - started
        lr = optimizer.param_groups[0]["lr"]
        history.append({"epoch": epoch + 1, "loss": mean, "accuracy": hits, "lr": lr, "seconds": seconds})
        log.info("%s: epoch %d/%d loss %.3f acc %.3f in %.1f s", title, epoch + 1, train.epochs, mean, hits, seconds)
        if state is not None:
            io.save_state(state, _packed(settings, model, optimizer, ema, history))
        if after_epoch is not None and after_epoch(model, epoch + 1):
            break
    bar.close()
    if ema is not None:
        model.load_state_dict(ema.module.state_dict())
    return history


def _scheduler(optimizer: Any, train: TrainConfig, updates: int) -> Any:
    if train.sched == "none":
        return None
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=train.sched,
        num_epochs=train.epochs,
        warmup_epochs=min(train.warmup_epochs, train.epochs - 1),
        warmup_lr=train.warmup_lr,
        min_lr=train.min_lr,
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
        raise ValueError(f"{state} was left by a run with other settings; use another --out, or start again without --resume")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    if ema is not None:
        ema.module.load_state_dict(saved["ema"])
    history: list[dict[str, float]] = saved["history"]
    log.info("resumed after epoch %d", len(history))
    return history
