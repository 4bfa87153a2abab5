"""Decoupled knowledge distillation (Zhao et al., 2203.08679): the target token and the others, weighted separately.

`KL(p‖q) = TCKD + (1 - p_t)·NCKD`: TCKD is the KL of target against not target, NCKD that of the other tokens among
themselves. Where the teacher is certain, plain KL barely sees the others; DKD gives them their own weight.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from dpkd.api import Card, LossConfig, LossSpec, Signal, TokenInputs, TokenLoss, Trait, hookimpl, setting
from dpkd.functional import kl, log_total
from dpkd_zoo.papers import DKD, at


class DKDConfig(LossConfig):
    """The two weights, which token is the target, and a temperature."""

    alpha: float = setting(
        1.0, description="α: weight of the target's part", source="1.0 in all released configs", ge=0
    )
    beta: float = setting(
        1.0,
        description="β: weight of the other tokens' part",
        source="our choice; released configs: 0.5 and 2 (ImageNet), 2 to 8 (CIFAR-100)",
        gt=0,
    )
    target: Literal["response", "teacher"] = setting(
        "response",
        description="the response's token, or the teacher's likeliest one",
        source="DKD: the label; `teacher` for text that is not a reference",
    )
    temperature: float = setting(
        1.0, description="divides both models' logits", source="released configs: 1 on ImageNet, 4 on CIFAR-100", gt=0
    )


def _split(log_NV: Tensor, target_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of target and not target `[N, 2]`, and of the others among themselves `[N, V]`."""
    others_NV = log_NV.scatter(-1, target_N1, -math.inf)
    rest_N1 = log_total(others_NV).unsqueeze(-1)
    binary_N2 = torch.cat([log_NV.gather(-1, target_N1), rest_N1], dim=-1)
    # Where no other token is left there is nothing to divide by.
    return binary_N2, others_NV - rest_N1.masked_fill(rest_N1 == -math.inf, 0.0)


class DKDLoss(TokenLoss[DKDConfig]):
    """`α · TCKD + β · NCKD`."""

    def forward(self, x: TokenInputs) -> Tensor:
        c = self.config
        log_p_NV, log_q_NV = x.teacher_log_probs(c.temperature), x.student_log_probs(c.temperature)
        target_N = x.targets if c.target == "response" else log_p_NV.argmax(-1)
        binary_p_N2, others_p_NV = _split(log_p_NV, target_N.unsqueeze(-1))
        binary_q_N2, others_q_NV = _split(log_q_NV, target_N.unsqueeze(-1))
        others_N = c.beta * x.part("others", kl(others_p_NV, others_q_NV))
        if c.alpha == 0:
            return others_N
        return c.alpha * x.part("target", kl(binary_p_N2, binary_q_N2)) + others_N


def _reads(config: DKDConfig) -> frozenset[Signal]:
    targets = {Signal.TARGETS} if config.target == "response" else set()
    return frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS, *targets})


SPEC = LossSpec(
    name="dkd",
    loss=DKDLoss,
    config=DKDConfig,
    card=Card(
        title="Decoupled knowledge distillation",
        summary="The target token against the rest, and the rest among themselves, each with its own weight.",
        formula="α·KL([pₜ, 1-pₜ]‖[qₜ, 1-qₜ]) + β·KL(p̂‖q̂),  p̂ = p without t, renormalised",
        sources=(
            at(
                DKD, "released code megvii-research/mdistiller, mdistiller/distillers/DKD.py: α·tckd_loss + β·nckd_loss"
            ),
        ),
        use_when="The teacher is very certain, so plain KL is little more than cross-entropy: β brings back what it "
        "knows about the other tokens.",
        avoid_when="The tail of the vocabulary is noise: β gives it the same weight whether the teacher is certain or "
        "not.",
        notes="From image classification. Plain KL is α = 1 and β = 1-pₜ, token by token. The released code "
        "multiplies by temperature² and adds cross-entropy (terms.lm); neither is done here. The loss itself takes "
        "about 2.3 times kd's time. Infinite where the student excludes a token (a logit of -inf) that the teacher "
        "does not.",
        latex=r"\alpha\,\mathrm{KL}\big([p_t,1-p_t]\,\|\,[q_t,1-q_t]\big)+\beta\,\mathrm{KL}(\hat p\,\|\,\hat q), "
        r"\qquad \hat p=p\text{ without }t\text{, renormalized}",
    ),
    reads=_reads,
    traits=frozenset({Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT}),
)


@hookimpl
def dpkd_losses() -> list[LossSpec]:
    return [SPEC]
