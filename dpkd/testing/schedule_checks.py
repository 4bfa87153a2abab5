"""Check of the settings that may follow the step: the engine gives a loss a new config between two calls. N rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import ValidationError
from torch import Tensor

from dpkd.api import Loss, LossConfig, RolloutLoss
from dpkd.testing.inputs import rollout_of
from dpkd.testing.results import CheckSkipped
from dpkd.testing.subject import FOUNDATION, Check, LossUnderTest, require_close


def settings_are_read_at_each_call(subject: LossUnderTest) -> None:
    """A new value of any numeric setting decides the next call: nothing is worked out of the config in `__init__`.

    Settings that decide the shape of the loss's own weights are left out: they cannot follow the step.
    """
    others = list(_other_settings(subject.config))
    if not others:
        raise CheckSkipped("the loss has no numeric setting")
    for name, config in others:
        old, new = getattr(subject.config, name), getattr(config, name)
        changed, fresh = subject.build(), LossUnderTest(subject.spec, config).build()
        if _shapes(changed) != _shapes(fresh):
            continue
        changed.config = config
        message = (
            f"{name} was changed from {old:g} to {new:g}, as a schedule does, and the loss has another value than "
            f"one made with {new:g}: read self.config.{name} in forward, not in __init__"
        )
        for found, expected in zip(_results(subject, changed), _results(subject, fresh), strict=True):
            require_close(found, expected, message)


def _other_settings(config: LossConfig) -> Iterator[tuple[str, LossConfig]]:
    """For each numeric setting its name, and the settings with another valid value of it."""
    values = config.model_dump()
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        whole = isinstance(value, int)
        for other in (value + 1, value - 1) if whole else (0.75 * value + 0.1, 1.25 * value, 0.5 * value, value - 0.1):
            try:
                changed = type(config).model_validate({**values, name: other})
            except ValidationError:
                continue
            if getattr(changed, name) != value:
                yield name, changed
                break


def _shapes(loss: Loss) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in loss.state_dict().items()}


def _results(subject: LossUnderTest, loss: Loss) -> list[Tensor]:
    """Values `[N]` of the current settings, and before them the advantages `[N]` of a rollout loss."""
    batch = subject.batch(seed=5)
    own = LossUnderTest(subject.spec, loss.config)
    advantages = [loss.advantages(rollout_of(batch))] if isinstance(loss, RolloutLoss) else []
    return [*advantages, own.values(batch, loss)]


CHECKS = (Check(settings_are_read_at_each_call, requires=FOUNDATION),)
