"""Losses that work out something of their settings when they are made, so that no schedule reaches it."""

from __future__ import annotations

from typing import Any

from bad_losses import bad, bad_spec
from good_losses import BOTH, DRAWN, PAIRS, Reinforce, Settings, loss_class, spec_of
from torch import Tensor

from dpkd.api import LossConfig, PairLoss, Rollout, RolloutLoss, TokenLoss, Trait, setting
from dpkd.functional import kl, preference


class Power(LossConfig):
    """A whole number at the end of its range."""

    power: int = setting(3, description="exponent", source="made up", ge=1, le=3)


def _keep(base: type[Any]) -> Any:
    def made(self: Any, config: Any) -> None:
        base.__init__(self, config)
        self.kept = next(iter(config.model_dump().values()))

    return made


@bad("settings_are_read_at_each_call", members={"__init__": _keep(TokenLoss)})
def temperature_of_the_first_step(self: Any, x: Any) -> Tensor:
    return kl(x.teacher_log_probs(1 + self.kept), x.student_log_probs(1 + self.kept))


@bad("settings_are_read_at_each_call", base=PairLoss, reads=PAIRS, members={"__init__": _keep(PairLoss)})
def beta_of_the_first_step(self: Any, x: Any) -> Tensor:
    ratio_t, ratio_s = x.student.chosen - x.teacher.chosen, x.student.rejected - x.teacher.rejected
    return preference(self.kept * (ratio_t - ratio_s))


def _cubed(self: Any, x: Any) -> Tensor:
    return kl(x.teacher_log_probs(), x.student_log_probs()) ** self.kept  # type: ignore[no-any-return]


bad_spec(
    "settings_are_read_at_each_call",
    "power_of_the_first_step",
    spec_of("power", loss_class(TokenLoss, _cubed, __init__=_keep(TokenLoss)), BOTH, config=Power),
)


def _advantages_of_the_first_step(self: Any, rollout: Rollout) -> Tensor:
    return self.kept * Reinforce.advantages(self, rollout)  # type: ignore[arg-type]


_whole = loss_class(
    RolloutLoss, Reinforce.forward, __init__=_keep(RolloutLoss), advantages=_advantages_of_the_first_step
)
bad_spec(
    "settings_are_read_at_each_call",
    "advantages_of_the_first_step",
    spec_of("advantages-of-the-first-step", _whole, DRAWN, Trait.SCORE_FUNCTION, config=Settings),
)
