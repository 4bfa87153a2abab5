"""Policy gradients with one bug each."""

from __future__ import annotations

from typing import Any

import torch
from bad_losses import bad, bad_spec
from good_losses import BOTH, DRAWN, Reinforce, Settings, loss_class, spec_of
from torch import Tensor

from dpkd.api import Rollout, RolloutLoss, Signal, Trait
from dpkd.functional import gather_logps

# --- rollouts


def _flipped(self: Any, x: Any) -> Tensor:
    return x.advantages * x.student_logps()  # type: ignore[no-any-return]


def _without_score_function(self: Any, x: Any) -> Tensor:
    """E[∇ log q] = 0: the log-ratio of the drawn token teaches nothing."""
    return x.student_logps() - x.teacher_logps + 0 * x.advantages  # type: ignore[no-any-return]


def _own_reward_only(self: Any, rollout: Rollout) -> Tensor:
    """Forgets what follows."""
    return rollout.teacher_logps - rollout.rollout_logps


def _per_response(self: Any, rollout: Rollout) -> Tensor:
    return torch.zeros(int(rollout.sequence.max()) + 1 if len(rollout.sequence) else 0)


def _sequence_kl(student_logps: Any, teacher_logps: Any, config: Settings) -> Tensor:
    terms = [q.sum().exp() * (q.sum() - p.sum()) for q, p in zip(student_logps, teacher_logps, strict=True)]
    return torch.stack(terms).sum()


def _bad_rollout(check: str, name: str, *, reads: frozenset[Signal] = DRAWN, told: Any = None, **members: Any) -> None:
    whole: dict[str, Any] = {"advantages": Reinforce.advantages, "forward": Reinforce.forward, **members}
    loss = loss_class(RolloutLoss, whole.pop("forward"), **whole)
    bad_spec(check, name, spec_of(name.replace("_", "-"), loss, reads, Trait.SCORE_FUNCTION), **(told or {}))


_bad_rollout("expected_gradient", "flipped_sign", forward=_flipped)
_bad_rollout("expected_gradient", "no_score_function", forward=_without_score_function)
_bad_rollout("expected_gradient", "short_sighted", advantages=_own_reward_only, told={"objective": _sequence_kl})
_bad_rollout(
    "one_advantage_per_token", "one_per_response", advantages=_per_response, reads=DRAWN - {Signal.TEACHER_LOGPS}
)


@bad("expected_gradient", Trait.SCORE_FUNCTION, reads=BOTH | {Signal.TARGETS})
def log_ratio_of_one_token(self: Any, x: Any) -> Tensor:
    return gather_logps(x.student_log_probs(), x.targets) - gather_logps(x.teacher_log_probs(), x.targets)
