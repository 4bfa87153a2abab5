"""ImitKD (Lin et al., 2009.07253): the student writes, the teacher labels each next token.

Imitation learning (DAgger) for text: responses by data set and student in turn, and at each position either the
teacher's likeliest token as a label, or its whole distribution.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import KLSum, kl, nll
from dpkd_zoo.papers import GKD, IMITKD, at


class ImitKDConfig(LossConfig):
    """The teacher's label at each position."""

    target: Literal["choice", "distribution"] = setting(
        "choice",
        description="the teacher's likeliest token as a label, or its distribution (forward KL)",
        source="the paper's ImitKD is the choice (released code: the teacher's argmax), ImitKD + Full the distribution",
    )


class ImitKDLoss(TokenLoss[ImitKDConfig]):
    """`-log q(argmax p)`, or `KL(p‖q)`."""

    def forward(self, x: TokenInputs) -> Tensor:
        log_q_NV = x.student_log_probs()
        if self.config.target == "distribution":
            return kl(x.teacher_log_probs(), log_q_NV)
        return nll(log_q_NV, x.teacher_logits.argmax(-1))

    def kl_sum(self) -> KLSum | None:
        return KLSum(forward=1.0) if self.config.target == "distribution" else None


SPEC = LossSpec(
    name="imitkd",
    loss=ImitKDLoss,
    config=ImitKDConfig,
    card=Card(
        title="Imitation learning KD",
        summary="The teacher's next token, or its distribution, along text that the student partly writes.",
        formula="-log q(v*),  v* = argmax p   (target=distribution: Σᵥ p(v)·log(p(v)/q(v)))",
        sources=(
            at(IMITKD, "Algorithm 1; released generation/distillation.py: labels and schedules"),
            at(GKD, "§3, as a baseline"),
        ),
        use_when="You want hard labels on the student's own prefixes: greedy decoding of translations or summaries.",
        avoid_when="The student will be sampled from: labels make it over-confident; use target=distribution or gkd.",
        notes="Not a preset of another loss: no other takes the teacher's argmax as the label. What differs from the "
        "released code: its share of data-set text falls over the run (linearly or exponentially, 200^(-t/N)), and "
        "text is decoded by a translator with beams; here the share is fixed at one half (text.mix) and responses are "
        "sampled: text.sampling.temperature=0 is greedy. On the data set's own responses its labels are their tokens; "
        "here they are the teacher's at every position. GKD calls forward KL at λ = 0.5 ImitKD: target=distribution. "
        "The loss itself takes about 0.4 times kd's time; sampling in the student's steps takes more. Infinite where "
        "the student excludes the teacher's choice (a logit of -inf).",
        latex=r"-\log q(v^*), \qquad v^*=\mathrm{argmax}_v\,p(v)",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    suggests={"text": {"source": "mixed", "mix": {"dataset": 0.5, "student": 0.5}}},
    traits=frozenset({Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
