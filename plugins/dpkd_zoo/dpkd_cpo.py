"""CPO form of DPKD (Table 2 of 2406.19774; Xu et al., 2401.08417): no reference, plus likelihood of the chosen.

The paper prints `β log q(y_t)/q(y_t)`, which is 0 for every model; the denominator must be q(y_s).
"""

from __future__ import annotations

from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, PairInputs, PairLoss, Trait, hookimpl, setting
from dpkd.functional import aggregate, preference
from dpkd_zoo import pairs
from dpkd_zoo.papers import CPO, DPKD, TRL_PREFERENCE, at


class DPKDCPOConfig(LossConfig):
    """Preference, and the likelihood term."""

    beta: float = setting(0.1, description="β of the preference", source="CPO §4.2, by TRL (DPKD: none)", gt=0)
    aggregation: pairs.Aggregation = pairs.aggregation("sum", "DPKD Table 2 caption", "log-probs in the preference")
    nll_weight: float = setting(
        1.0, description="weight of -log q(y_t)", source="DPKD Table 2 caption; TRL's cpo_alpha", ge=0
    )
    nll_aggregation: pairs.Aggregation = pairs.aggregation(
        "sum", "DPKD Table 2 caption (TRL: a mean over all tokens of the batch)", "log-prob in the likelihood term"
    )


class DPKDCPOLoss(PairLoss[DPKDCPOConfig]):
    """`-log σ(β log q(y_t) - β log q(y_s)) - w log q(y_t)`."""

    def forward(self, x: PairInputs) -> Tensor:
        c = self.config
        likelihood = aggregate(x.student.chosen, x.lengths.chosen, c.nll_aggregation)
        chosen = x.part("preference", preference(c.beta * pairs.margin(x, None, c.aggregation)))
        return chosen - c.nll_weight * x.part("log_likelihood", likelihood)


SPEC = LossSpec(
    name="dpkd-cpo",
    loss=DPKDCPOLoss,
    config=DPKDCPOConfig,
    card=Card(
        title="DPKD, CPO form",
        summary="Preference by the student's own log-probs, plus likelihood of the teacher's response.",
        formula="-log σ(β·log q(yₜ) - β·log q(yₛ)) - log q(yₜ)",
        sources=(
            at(DPKD, "Table 2"),
            at(CPO, "§3 and Eq. 3, as numbered in TRL's code"),
            at(TRL_PREFERENCE, "CPOTrainer, loss_type sigmoid"),
        ),
        use_when="Teacher log-probs are not available (text only), or cost too much.",
        avoid_when="The teacher can score: the reference keeps the student near it.",
        notes="The paper's formula has q(yₜ) in the denominator, a typo for q(yₛ). The likelihood of the teacher's "
        "response is part of the loss, so no LM term is needed. nll_aggregation=mean averages within each response, "
        "so all pairs weigh the same; TRL takes one mean over all tokens of the batch, where long responses weigh "
        "more. The LM term has TRL's denominator, on data-set responses: nll_weight=0 terms.lm.weight=1.",
        latex=r"-\log\sigma\big(\beta\log q(y_t)-\beta\log q(y_s)\big)-\log q(y_t)",
    ),
    reads=pairs.STUDENT,
    reward_scale=lambda config: config.beta,
    suggests=pairs.TEACHER_OVER_STUDENT,
    traits=frozenset({Trait.NON_NEGATIVE}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
