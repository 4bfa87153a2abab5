"""DPKD with the penalty of DPOP (Smaug, Pal et al., 2402.13228), on whole responses.

A preference loss is satisfied when both responses become unlikely, the rejected one faster. The penalty subtracts from
the margin what log q(y_t) falls short of the reference, here the teacher: y_t must not become less likely.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Trait, hookimpl, setting
from dpkd.functional import preference
from dpkd_zoo import pairs
from dpkd_zoo.papers import DPKD, DPKD_CODE, SMAUG, at


class DPKDDPOPConfig(LossConfig):
    """Strength, weight of the penalty, length normalization."""

    beta: float = setting(0.1, description="β of the implicit reward", source="released arguments.py of DPKD", gt=0)
    dpop_weight: float = setting(
        50.0,
        description="λ: what each nat that log q(y_t) falls short subtracts from the margin",
        source="released arguments.py of DPKD; Smaug's authors, issue 2: 5 to 500 differ little",
        ge=0,
    )
    aggregation: pairs.Aggregation = pairs.aggregation("mean", "DPKD Eq. 9 (Smaug: sum)")


class DPKDDPOPLoss(PairLoss[DPKDDPOPConfig]):
    """`-log σ(β [h - λ max(0, log p(y_t)/q(y_t))])`, `h = log q/p(y_t) - log q/p(y_s)`."""

    def forward(self, x: PairInputs) -> Tensor:
        c = self.config
        ratio_t, ratio_s = pairs.log_ratios(x, x.teacher, c.aggregation)
        penalty = x.part("penalty", torch.relu(-ratio_t))  # relu has no gradient at 0, clamp has
        margin = x.part("margin", ratio_t - ratio_s)
        return preference(c.beta * (margin - c.dpop_weight * penalty))


SPEC = LossSpec(
    name="dpkd-dpop",
    loss=DPKDDPOPLoss,
    config=DPKDDPOPConfig,
    card=Card(
        title="DPKD with the DPOP penalty",
        summary="Preference with the teacher as reference, and a penalty where yₜ is less likely than to the teacher.",
        formula="-log σ(β·(h - λ·max(0, log(p(yₜ)/q(yₜ))))),  h = log(q(yₜ)/p(yₜ)) - log(q(yₛ)/p(yₛ)), log-ratios "
        "divided by |y|",
        sources=(
            at(
                SMAUG,
                "the penalty inside σ, as in PaddlePaddle/PaddleNLP, paddlenlp/transformers/dpo_criterion.py, dpop",
            ),
            at(DPKD, "Eq. 9; DPOP is cited in §4.4"),
            at(DPKD_CODE, "main.py:242-246: --DPOP, another form, see dpkd-token"),
        ),
        use_when="With dpkd both likelihoods fall: part/penalty keeps the teacher's response likely inside the loss.",
        avoid_when="The student is far below the teacher on yₜ, which is usual at the start: the penalty then "
        "outweighs the preference by λ to 1, and the loss is little more than likelihood of yₜ. Lower λ, or use dpkd "
        "with an LM term.",
        notes="Smaug's reference is the model before training, so its penalty starts at 0; the teacher as reference "
        "makes it a floor at the teacher's own likelihood, and the student starts below it. DPKD's released code has "
        "the penalty per token, outside σ and not multiplied by β (dpkd-token with form=dpop); here it is inside, as "
        "in Smaug. λ = 0 is dpkd. Costs the same as dpkd: two responses per prompt through student and teacher, about "
        "twice kd, plus sampling. The paper's first version misplaces a bracket, corrected by its authors "
        "(abacusai/smaug, issue 2).",
        latex=r"-\log\sigma\Big(\beta\Big[\log\frac{q(y_t)}{p(y_t)}-\log\frac{q(y_s)}{p(y_s)}-\lambda\max\Big(0,\log\frac{p(y_t)}{q(y_t)}"
        r"\Big)\Big]\Big)",
    ),
    reads=pairs.STUDENT_AND_TEACHER,
    reward_scale=lambda config: config.beta,
    suggests=pairs.WITH_LM_TERM,
    traits=frozenset({Trait.NON_NEGATIVE}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
