"""Settings of a loss that follow the step: the loss reads its config and knows nothing of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from dpkd.api import LossConfig
from dpkd.config.settings import ScheduleSettings


def scheduled(settings: ScheduleSettings, step: int, steps: int) -> float:
    """The value at a step (0-based) by the shape alone; a by-loss schedule is never behind the linear one.

    >>> s = ScheduleSettings(start=0.0, end=1.0, steps=5)
    >>> [scheduled(s, step, 100) for step in (0, 2, 4, 9)]
    [0.0, 0.5, 1.0, 1.0]
    """
    length = settings.steps or steps
    share = min(1.0, step / max(1, length - 1))
    if settings.shape == "cosine":
        share = 0.5 * (1 - math.cos(math.pi * share))
    return settings.start + (settings.end - settings.start) * share


@dataclass
class LossPace:
    """The state of a by-loss schedule: TAID's rule, as its released `update_t` has it (2501.16937)."""

    value: float
    momentum: float = 0.0
    previous: float | None = None

    def follow(self, loss: float, settings: ScheduleSettings) -> None:
        """`δ = (J' - J)/J'`, `m ← βm + (1-β)δ`, `t ← t + α·σ(m)·(end - t)`."""
        if self.previous is not None:
            fall = (self.previous - loss) / (abs(self.previous) + 1e-15)
            self.momentum = settings.momentum * self.momentum + (1 - settings.momentum) * fall
            pace = settings.rate / (1 + math.exp(-self.momentum))
            self.value += pace * (settings.end - self.value)
        self.previous = loss


class Schedules:
    """All scheduled settings of a run, by the name of the loss and of its setting."""

    def __init__(self, losses: Mapping[str, nn.Module], by_loss: Mapping[str, Mapping[str, ScheduleSettings]]) -> None:
        self._losses = losses
        self._schedules = {name: dict(schedules) for name, schedules in by_loss.items() if schedules}
        self._configs: dict[str, LossConfig] = {name: _config(losses[name]) for name in self._schedules}
        self._paces = {
            (name, setting): LossPace(settings.start)
            for name, schedules in self._schedules.items()
            for setting, settings in schedules.items()
            if settings.shape == "by-loss"
        }

    @property
    def follow_the_loss(self) -> set[str]:
        """The losses whose value is needed after every step."""
        return {name for name, _ in self._paces}

    def apply(self, step: int, steps: int) -> dict[str, float]:
        """Give each loss its settings of a step; returns them for the log."""
        values: dict[str, float] = {}
        for name, schedules in self._schedules.items():
            update = {setting: self._value(name, setting, s, step, steps) for setting, s in schedules.items()}
            self._losses[name].config = self._configs[name].model_copy(update=update)  # type: ignore[assignment]
            values |= {setting if name == "main" else f"{name}/{setting}": v for setting, v in update.items()}
        return values

    def _value(self, name: str, setting: str, settings: ScheduleSettings, step: int, steps: int) -> float:
        value = scheduled(settings, step, steps)
        if pace := self._paces.get((name, setting)):
            ahead = max if settings.end >= settings.start else min
            pace.value = value = ahead(value, pace.value)
        return round(value) if isinstance(getattr(self._configs[name], setting), int) else value

    def follow(self, losses: Mapping[str, float]) -> None:
        """Tell the by-loss schedules the mean losses of the step."""
        for (name, setting), pace in self._paces.items():
            if name in losses:
                pace.follow(losses[name], self._schedules[name][setting])

    def state(self) -> list[dict[str, Any]]:
        """What a checkpoint keeps."""
        return [{"loss": name, "setting": setting, **asdict(pace)} for (name, setting), pace in self._paces.items()]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """The inverse of `state`."""
        for row in state:
            key = (row["loss"], row["setting"])
            self._paces[key] = LossPace(row["value"], row["momentum"], row["previous"])


def _config(loss: nn.Module) -> LossConfig:
    config: Any = loss.config
    return config  # type: ignore[no-any-return]
