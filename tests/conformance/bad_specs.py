"""Losses whose mathematics is right, with a bug in the settings, the card or the declared signals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bad_losses import bad, bad_spec
from good_losses import BOTH, CARD, COPY, DRAWN, FORWARD_KL, REINFORCE, Copy, loss_class
from pydantic import ConfigDict, Field
from torch import Tensor

from dpkd.api import HIDDEN, LossConfig, Signal, TokenLoss
from dpkd.functional import kl

# --- config and card


class Open(LossConfig):
    """Takes anything, as configs shared by all losses do."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Changeable(LossConfig):
    """Can be changed while it is in use."""

    model_config = ConfigDict(frozen=False)


class Infinite(LossConfig):
    """Takes nan."""

    model_config = ConfigDict(allow_inf_nan=True)
    beta: float = Field(0.5, description="strength", json_schema_extra={"source": "made up"})


class Undescribed(LossConfig):
    """A setting without a word."""

    beta: float = 0.5


for number, wrong in enumerate((Open, Changeable, Infinite)):
    bad_spec("config_is_closed", f"config_{number}", replace(FORWARD_KL, config=wrong))
for number, changed in enumerate(
    (
        {"config": Undescribed},
        {"card": replace(CARD, use_when="")},
        {"card": replace(CARD, sources=())},
        {"name": "Forward_KL"},
        {"suggests": {"loss": {"beta": 1.0}}},
        {"suggests": {"train": {"learning_rate": 1.0}}},
    )
):
    bad_spec("card_is_complete", f"card_{number}", replace(FORWARD_KL, **changed))  # type: ignore[arg-type]

# --- signals


@bad("only_declared_signals", reads=frozenset({Signal.STUDENT_LOGITS}))
def needs_that_lie(self: Any, x: Any) -> Tensor:
    return kl(x.teacher_log_probs(), x.student_log_probs())


bad_spec("only_declared_signals", "never_reads", replace(FORWARD_KL, reads=BOTH | {Signal.TARGETS}))
bad_spec("only_declared_signals", "never_reads_logits", replace(REINFORCE, reads=DRAWN | {Signal.TEACHER_LOGITS}))


@bad("only_declared_signals", base=Copy, reads=HIDDEN | {Signal.STUDENT_LOGITS})
def reads_logits_too(self: Any, x: Any) -> Tensor:
    return Copy.forward(self, x) + x.student_logits.logsumexp(-1)


bad_spec("only_declared_signals", "never_reads_hidden_states", replace(COPY, reads=HIDDEN | {Signal.TARGETS}))


@bad("bfloat16_inputs", base=Copy, reads=HIDDEN)
def hidden_states_in_half_precision(self: Any, x: Any) -> Tensor:
    return (x[Signal.STUDENT_HIDDEN] - x[Signal.TEACHER_HIDDEN]).square().sum((1, 2)).float()


def _unbound(self: Any, x: Any) -> Tensor:
    return (x.student_hidden - x.teacher_hidden).square().sum((1, 2))


bad_spec("only_declared_signals", "forgets_bind", replace(COPY, loss=loss_class(TokenLoss, _unbound)))
