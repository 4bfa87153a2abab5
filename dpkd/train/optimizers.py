"""AdamW and its learning rate: a pure function of the step, so that nothing about it needs saving."""

from __future__ import annotations

import math

import torch
from torch import nn

from dpkd.config.settings import TrainSettings


def learning_rate(step: int, steps: int, settings: TrainSettings) -> float:
    """Learning rate of a step (0-based): linear warm-up, then constant, linear or cosine down to `min_lr`.

    >>> s = TrainSettings(lr=1.0, min_lr=0.0, warmup_steps=2, schedule="linear")
    >>> [learning_rate(i, 6, s) for i in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    share = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.min_lr + (settings.lr - settings.min_lr) * share


def make_optimizer(module: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; no weight decay on biases, norms and other vectors."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in trainable)
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused
    )
