"""The optimizer of a run and its learning rate: a pure function of the step, so that nothing about it needs saving."""

from __future__ import annotations

import math

import torch
from torch import nn

from dpkd.config.settings import TrainSettings
from dpkd.models.optimizers import Common, optimizer_kind, weights_of
from dpkd.models.schedules import OWN, schedule_factor


def learning_rate(step: int, steps: int, settings: TrainSettings) -> float:
    """Learning rate of a step (0-based): linear warm-up, then the schedule; cosine and linear end at `min_lr`.

    >>> s = TrainSettings(lr=1.0, min_lr=0.0, warmup_steps=2, schedule="linear")
    >>> [learning_rate(i, 6, s) for i in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule not in OWN:
        own = settings.schedule_settings
        return settings.lr * schedule_factor(settings.schedule, own, settings.lr, settings.warmup_steps, steps)(step)
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    share = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.min_lr + (settings.lr - settings.min_lr) * share


def make_optimizer(module: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer that `train.optimizer` names, over the trainable parameters of a module."""
    common = Common(settings.lr, settings.weight_decay, settings.betas, settings.eps)
    return optimizer_kind(settings.optimizer).make(weights_of(module), common, settings.own_optimizer_settings)


def describe_optimizer(settings: TrainSettings) -> str:
    """For the plan: the optimizer, its settings, and its learning rate."""
    own = settings.own_optimizer_settings.model_dump()
    shown = "".join(f", {name} {value}" for name, value in own.items() if value is not None)
    schedule = "".join(f", {name} {value}" for name, value in settings.schedule_settings.items())
    return (
        f"{settings.optimizer} ({optimizer_kind(settings.optimizer).summary}){shown}, lr {settings.lr:g} "
        f"{settings.schedule}{schedule}, warm-up {settings.warmup_steps}"
    )
