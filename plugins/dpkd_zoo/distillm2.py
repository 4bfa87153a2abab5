"""DistiLLM-2's contrastive objective (Ko et al., 2503.07067): skew KL on the teacher's text, its reverse on the other.

`(1-β) · KL(p ‖ α p + (1-α) q)` where the teacher wrote the token, `β · KL(q ‖ (1-α) p + α q)` where the student did.
The first raises q where the teacher goes, the second lowers it where only the student would go. Every prompt gets one
response by each model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import kl, log_mix
from dpkd_zoo.papers import DISTILLM2, at


class DistiLLM2Config(LossConfig):
    """The two skews, and the weight of the student's text."""

    skew_teacher: float = setting(
        0.1, description="α on the teacher's text: share of p in the mixture", source="DistiLLM-2: α₀ = 0.1", ge=0, lt=1
    )
    skew_student: float = setting(
        0.1, description="α on the student's text: share of q in the mixture", source="DistiLLM-2: α₀ = 0.1", ge=0, lt=1
    )
    beta: float = setting(
        0.5,
        description="β: weight of the student's text; 1-β is that of the teacher's",
        source="DistiLLM-2: β₀ = 0.5",
        gt=0,
        lt=1,
    )


class DistiLLM2Loss(TokenLoss[DistiLLM2Config]):
    """`2(1-β) · SKL` at positions of the teacher (or data set), `2β · SRKL` at those of the student."""

    def forward(self, x: TokenInputs) -> Tensor:
        c, own_N = self.config, x.by_student
        log_p_NV, log_q_NV = x.teacher_log_probs(), x.student_log_probs()
        # Every row is computed once, by its writer: rows taken by a mask would make the host wait for their number.
        share_N = torch.where(own_N, log_q_NV.new_full((), 1 - c.skew_student), log_q_NV.new_full((), c.skew_teacher))
        log_m_NV = log_mix(log_p_NV, log_q_NV, share_N.unsqueeze(-1))
        value_N = kl(torch.where(own_N.unsqueeze(-1), log_q_NV, log_p_NV), log_m_NV)
        forward_N, reverse_N = x.part("skl", value_N, of=~own_N), x.part("srkl", value_N, of=own_N)
        return torch.where(own_N, 2 * c.beta * reverse_N, 2 * (1 - c.beta) * forward_N)


SPEC = LossSpec(
    name="distillm2",
    loss=DistiLLM2Loss,
    config=DistiLLM2Config,
    card=Card(
        title="Contrastive distillation on text by both (DistiLLM-2)",
        summary="Skew KL on the teacher's responses, skew reverse KL on the student's, to the same prompts.",
        formula="2(1-β)·KL(p‖α·p + (1-α)·q) on the teacher's text,  2β·KL(q‖(1-α)·p + α·q) on the student's",
        sources=(at(DISTILLM2, "Eq. 2, the full objective; Table 11 for the defaults; released distillm_trainer.py"),),
        use_when="Both models can write: the student learns the teacher's responses and unlearns its own, in bounded "
        "steps.",
        avoid_when="Sampling is too slow, or only the data set's text is available: there is no contrast without the "
        "student's responses. skl and srkl are the two halves by themselves.",
        notes="Not included: the paper's update of α from batch to batch, 1 - (1-α₀)·m/(p(y)-q(y)) within [0.01, "
        "0.1], which needs statistics of whole batches; the released code has it switched off, and the growing β too. "
        "The released growth of β ends half-way through training, 1 + 0.5·min(1, 2·step/steps), so its schedule lasts "
        "half of the run: schedules.beta={start: 0.5, end: 0.75, steps: N} with N half of train.steps, then constant. "
        "The released code detaches the mixture of the reverse part; here it has a gradient, as in srkl. The mean is "
        "over the tokens of both texts, so that a longer response weighs more. Suggested text, as in the paper: both "
        "models sample at temperature 0.8, the student again every epoch (text.refresh=per_epoch). Text from the data "
        "set counts as the teacher's. A token costs the same as with skl or srkl; there are twice as many, and both "
        "models write.",
        latex=r"2(1-\beta)\,\mathrm{KL}\big(p\,\|\,\alpha p+(1-\alpha)q\big)\text{ on the teacher's text}, \qquad "
        r"2\beta\,\mathrm{KL}\big(q\,\|\,(1-\alpha)p+\alpha q\big)\text{ on the student's}",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS, Signal.BY_STUDENT}),
    suggests={
        "text": {
            "source": "each",
            "each": ["teacher", "student"],
            "refresh": "per_epoch",
            "sampling": {"temperature": 0.8},
            "teacher_sampling": {"temperature": 0.8},
        }
    },
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
