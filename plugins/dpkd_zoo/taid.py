"""TAID (Shing et al., 2501.16937): the target moves from the student itself to the teacher during the run.

`p_t = softmax((1-t) z_q + t z_p)`, the student's logits without gradient, and forward KL to it: a teacher that is never
too far ahead. The gradient is q - p_t. The loss does not know the step: `t` follows `schedules.t`, which it suggests.
"""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import kl
from dpkd_zoo.papers import TAID, at


class TAIDConfig(LossConfig):
    """How far the target has moved."""

    t: float = setting(
        0.4,
        description="share of the teacher's logits in the target; in a run `schedules.t` sets it; 1 is fkl",
        source="TAID: starts at 0.4 (0.2 to 0.4)",
        ge=0,
        le=1,
    )


class TAIDLoss(TokenLoss[TAIDConfig]):
    """`KL(p_t‖q)`, p_t between student and teacher, without gradient."""

    def forward(self, x: TokenInputs) -> Tensor:
        t, log_q_NV = self.config.t, x.student_log_probs()
        target_NV = x.teacher_log_probs()
        if t == 0:  # 0 · (-inf) is NaN
            target_NV = log_q_NV.detach()
        elif t < 1:
            # Log-probs for logits: they differ by a constant of the row, which the softmax takes away.
            target_NV = ((1 - t) * log_q_NV.detach() + t * target_NV).log_softmax(-1)
        return kl(target_NV, log_q_NV)


SPEC = LossSpec(
    name="taid",
    loss=TAIDLoss,
    config=TAIDConfig,
    card=Card(
        title="Temporally adaptive interpolated distillation",
        summary="Forward KL to a target that moves from the student to the teacher as the loss falls.",
        formula="KL(pₜ‖q),  pₜ = softmax((1-t)·z_q + t·z_p), no gradient through pₜ",
        sources=(at(TAID, "§3; released code SakanaAI/TAID, distil_losses/taid.py, for the loss and the schedule"),),
        use_when="Teacher and student are far apart: the target is always within the student's reach.",
        avoid_when="The run is very short, or t does not move: with t below 1 the student partly follows itself.",
        notes="A value near 0 means that the target is near, not that the teacher is: watch the divergence in an "
        "evaluation. Suggested schedule, as in the paper: t from 0.4 to 1, by-loss (α 5e-4, momentum 0.99), never "
        "behind the linear one, which in the released code ends one step later. The schedule sets t, and a loss.t of "
        "your own counts only where schedules.t allows "
        "it: schedules.t.start=0.7 schedules.t.end=0.7 schedules.t.shape=linear fixes it. The loss itself takes about "
        "1.1 times kd's time.",
        latex=r"\mathrm{KL}(p_t\,\|\,q), \qquad p_t=\mathrm{softmax}\big((1-t)\,z_q+t\,z_p\big)\text{ without "
        r"gradient}",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    suggests={"schedules": {"t": {"shape": "by-loss", "start": 0.4, "end": 1.0}}},
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT, Trait.DETACHED_WEIGHTS}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
