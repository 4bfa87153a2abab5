"""BiLD (Li et al., 2406.13555): the differences between the logits of the k likeliest tokens, led by either model.

The k(k-1)/2 differences of the teacher's top k, and the student's differences of the same tokens, each through a
softmax, are compared by KL; then the same for the student's own top k. The student learns the order of the likely
tokens, and the long tail is ignored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import kl
from dpkd_zoo.papers import BILD, at


class BiLDConfig(LossConfig):
    """How many tokens (two have one difference, and nothing to learn), and the temperature of their differences."""

    k: int = setting(8, description="likeliest tokens of the leading model", source="BiLD's code: 8", ge=3, le=128)
    temperature: float = setting(3.0, description="divides the logits", source="BiLD's code: 3", gt=0)


def _led(p_NK: Tensor, q_NK: Tensor, temperature: float) -> Tensor:
    """KL between the softmaxes of the pairwise differences of the same K logits under both models, `[N]`."""
    outside_p_NK, outside_q_NK = p_NK == -math.inf, q_NK == -math.inf
    first, second = torch.triu_indices(p_NK.shape[-1], p_NK.shape[-1], offset=1, device=p_NK.device)
    left_out_NK = outside_p_NK | outside_q_NK
    left_out_NP = left_out_NK[:, first] | left_out_NK[:, second]
    # Where no pair is left, any values serve that are the same for both.
    none_N1 = left_out_NP.all(-1, keepdim=True)

    def log_shares(logits_NK: Tensor) -> Tensor:
        z_NK = logits_NK.masked_fill(left_out_NK, 0.0) / temperature
        gap_NP = (z_NK[:, first] - z_NK[:, second]).masked_fill(left_out_NP, -math.inf)
        return gap_NP.masked_fill(none_N1, 0.0).log_softmax(-1)

    value_N = kl(log_shares(p_NK), log_shares(q_NK))
    return value_N.masked_fill((outside_p_NK != outside_q_NK).any(-1), math.inf)


class BiLDLoss(TokenLoss[BiLDConfig]):
    """`KL(softmax Δp‖softmax Δq)` over the pairs of the teacher's top k, plus that over the student's top k."""

    def forward(self, x: TokenInputs) -> Tensor:
        p_NV, q_NV, temperature = x.teacher_logits, x.student_logits, self.config.temperature
        k = min(self.config.k, p_NV.shape[-1])
        values = {}
        for name, leader_NV in (("teacher_led", p_NV), ("student_led", q_NV.detach())):
            ids_NK = leader_NV.topk(k, dim=-1).indices
            values[name] = x.part(name, _led(p_NV.gather(-1, ids_NK), q_NV.gather(-1, ids_NK), temperature))
        return values["teacher_led"] + values["student_led"]


SPEC = LossSpec(
    name="bild",
    loss=BiLDLoss,
    config=BiLDConfig,
    card=Card(
        title="Bi-directional logits difference",
        summary="The order of the k likeliest tokens, by KL between softmaxes of their pairwise logit differences.",
        formula="KL(softmax Δp/T‖softmax Δq/T) over the pairs of the teacher's top k, plus the same over the student's",
        sources=(at(BILD, "L_BiLD = L_t-LD + L_s-LD; k, T and the form as in the released distil_losses/BILD.py"),),
        use_when="The teacher's long tail is noise and the ranking of its first few tokens is what matters.",
        avoid_when="The student is sampled at temperature 1: the loss says nothing about the mass outside the top k.",
        notes="Both directions use the KL from teacher to student; only the choice of the tokens changes. Zero "
        "wherever the chosen tokens have the same differences, whatever the others do. The order of a pair is that of "
        "the leading model. The loss itself takes about 0.4 times kd's time. Pairs with a token that both exclude are "
        "left out; infinite where only one of the models excludes a chosen token.",
        latex=r"\mathrm{KL}\big(\mathrm{softmax}(\Delta p/T)\,\|\,\mathrm{softmax}(\Delta q/T)\big)\text{ over pairs "
        r"of the teacher's top }k\text{, plus the same over the student's}",
    ),
    reads=frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS}),
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
