"""Learning-rate schedules by name: dpkd's own, and those of `transformers.get_scheduler`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal

OWN = ("cosine", "linear", "constant")
ScheduleName = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
]


def schedule_factor(
    name: str, settings: Mapping[str, Any], lr: float, warmup_steps: int, steps: int
) -> Callable[[int], float]:
    """The factor of the peak rate at a step (0-based), by a schedule of transformers."""
    return _factor(name, tuple(sorted(settings.items())), lr, warmup_steps, steps)


@lru_cache(maxsize=8)
def _factor(
    name: str, settings: tuple[tuple[str, Any], ...], lr: float, warmup_steps: int, steps: int
) -> Callable[[int], float]:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=lr)  # stands for the run's own
    made: Any = get_scheduler(name, optimizer, warmup_steps, steps, dict(settings))
    factor: Callable[[int], float] = made.lr_lambdas[0]
    return factor


def schedule_problem(name: str, settings: Mapping[str, Any], lr: float) -> str | None:
    """What is wrong with the settings of a schedule, in a sentence; None: nothing."""
    if name in OWN:
        return f"{name} has no settings but train.min_lr and train.warmup_steps" if settings else None
    from transformers import SchedulerType
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    common = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    function: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    known = inspect.signature(function).parameters.keys() - common
    if strange := sorted(settings.keys() - known):
        return f"{name} has no setting {', '.join(strange)} ({', '.join(sorted(known)) or 'it has none'})"
    try:
        schedule_factor(name, settings, lr, 1, 100)(50)
    except (TypeError, ValueError) as error:
        return f"{name}: {error}"
    return None
