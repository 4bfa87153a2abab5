"""Losses that keep the contract, one of each kind, with references in NumPy; and a short way to write more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpkd.api import (
    HIDDEN,
    Card,
    Layers,
    LossConfig,
    LossSpec,
    PairInputs,
    PairLoss,
    Rollout,
    RolloutInputs,
    RolloutLoss,
    Signal,
    Source,
    Stack,
    TokenInputs,
    TokenLoss,
    Trait,
    setting,
)
from dpkd.functional import KLSum, kl, preference, returns_to_go, token_mask

CARD = Card("A title", "One line.", "p", (Source("A paper", "https://example.org/paper", "Eq. 1"),), "often", "never")
BOTH = frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS})
PAIRS = frozenset({Signal.STUDENT_LOGPS, Signal.TEACHER_LOGPS})
PAIR_TOKENS = frozenset({Signal.STUDENT_TOKEN_LOGPS, Signal.TEACHER_TOKEN_LOGPS, Signal.LENGTHS})
DRAWN = frozenset({Signal.STUDENT_LOGITS, Signal.TARGETS, Signal.ADVANTAGES, Signal.TEACHER_LOGPS})


class Settings(LossConfig):
    """One number."""

    beta: float = setting(0.5, description="strength", source="made up", gt=0)


def spec_of(name: str, loss: type[Any], reads: frozenset[Signal], *traits: Trait, **more: Any) -> LossSpec:
    """A spec with a complete card."""
    how: dict[str, Any] = {"config": Settings, "card": CARD, **more}
    return LossSpec(name=name, loss=loss, reads=reads, traits=frozenset(traits), **how)


def loss_class(base: type[Any], forward: Callable[..., Any], **members: Any) -> type[Any]:
    """A loss class from its forward."""
    return type("Small", (base,), {"__doc__": forward.__doc__ or "A loss.", "forward": forward, **members})


class ForwardKL(TokenLoss[Settings]):
    """KL(p‖q)."""

    def forward(self, x: TokenInputs) -> Tensor:
        return kl(x.teacher_log_probs(), x.student_log_probs())

    def kl_sum(self) -> KLSum:
        return KLSum(forward=1.0)


def _np_log_softmax(logits: np.ndarray) -> np.ndarray:
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def forward_kl_reference(student_logits: np.ndarray, teacher_logits: np.ndarray, config: Settings) -> np.ndarray:
    """Σ p log(p/q), with 0 log 0 = 0."""
    log_q, log_p = _np_log_softmax(student_logits), _np_log_softmax(teacher_logits)
    return np.where(log_p == -np.inf, 0.0, np.exp(log_p) * (log_p - log_q)).sum(-1)


class DPO(PairLoss[Settings]):
    """-log σ(β · difference of log-ratios)."""

    def forward(self, x: PairInputs) -> Tensor:
        ratio_t = x.student.chosen - x.teacher.chosen
        ratio_s = x.student.rejected - x.teacher.rejected
        return preference(self.config.beta * (ratio_t - ratio_s))


def dpo_reference(student: Any, teacher: Any, config: Settings) -> np.ndarray:
    """log(1 + exp(-margin))."""
    margin = (student[0] - teacher[0]) - (student[1] - teacher[1])
    return np.logaddexp(0.0, -config.beta * margin)


class TokenWeightedDPO(PairLoss[Settings]):
    """DPO on mean log-ratios, each token weighted by its share of the teacher's mass on the response's tokens."""

    def forward(self, x: PairInputs) -> Tensor:
        gaps = []
        for log_q_BT, log_p_BT, length_B in zip(x.student_token_logps, x.teacher_token_logps, x.lengths, strict=True):
            outside_BT = ~token_mask(length_B, log_p_BT.shape[-1])
            weight_BT = log_p_BT.masked_fill(outside_BT, -torch.inf).softmax(-1)
            gaps.append((weight_BT * (log_q_BT - log_p_BT)).sum(-1))
        return preference(self.config.beta * (gaps[0] - gaps[1]))


def token_weighted_dpo_reference(
    student_token_logps: Any, teacher_token_logps: Any, lengths: Any, config: Settings
) -> np.ndarray:
    """Response by response, over its own tokens only."""
    found = []
    for log_q, log_p, length in zip(student_token_logps, teacher_token_logps, lengths, strict=True):
        rows = [(q[: int(n)], p[: int(n)]) for q, p, n in zip(log_q, log_p, length, strict=True)]
        found.append(np.array([np.average(q - p, weights=np.exp(p)) for q, p in rows]))
    return np.logaddexp(0.0, -config.beta * (found[0] - found[1]))


class Reinforce(RolloutLoss[Settings]):
    """-R log q of the drawn token, R the sum of log p/q from it to the end of its response."""

    def advantages(self, rollout: Rollout) -> Tensor:
        return returns_to_go(rollout.teacher_logps - rollout.rollout_logps, rollout.sequence)

    def forward(self, x: RolloutInputs) -> Tensor:
        return -x.advantages * x.student_logps()


def reinforce_reference(
    student_logits: np.ndarray, targets: np.ndarray, advantages: np.ndarray, config: Settings, **_: Any
) -> np.ndarray:
    """One row at a time."""
    log_q = _np_log_softmax(student_logits)
    return np.array([-a * row[y] for a, row, y in zip(advantages, log_q, targets, strict=True)])


class Sampled(TokenLoss[Settings]):
    """The reverse KL of one position from the drawn token: (log q/p) without gradient, times log q."""

    def forward(self, x: TokenInputs) -> Tensor:
        log_q, log_p = (z.gather(-1, x.targets[:, None])[:, 0] for z in (x.student_log_probs(), x.teacher_log_probs()))
        return (log_q - log_p).detach() * log_q


class Tempered(TokenLoss[Settings]):
    """KL(p‖q) with a temperature of its own that is learnt, and a fixed random projection."""

    def __init__(self, config: Settings) -> None:
        super().__init__(config)
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.register_buffer("offset", 0.1 * torch.rand(()))

    def forward(self, x: TokenInputs) -> Tensor:
        cold = x.student_logits * (self.log_temperature + self.offset).exp()
        return kl(x.teacher_log_probs(), cold.log_softmax(-1))


class Copy(TokenLoss[Settings]):
    """Squared distance of the last hidden states, of models of one width."""

    def bind(self, student: Stack, teacher: Stack) -> Layers:
        if student.width != teacher.width:
            raise ValueError(f"the widths are {student.width} and {teacher.width}, and must be one")
        return Layers((student.layers,), (teacher.layers,))

    def forward(self, x: TokenInputs) -> Tensor:
        return (x.student_hidden - x.teacher_hidden).square().sum((1, 2))


def copy_reference(student_hidden: Any, teacher_hidden: Any, weights: Any, config: Settings) -> np.ndarray:
    """One number at a time."""
    gaps = (student_hidden - teacher_hidden).reshape(len(student_hidden), -1)
    return np.array([sum(gap * gap for gap in row) for row in gaps])


class TotalVariation(TokenLoss[Settings]):
    """½ Σ |p - q|: a token that one model does not have costs the mass that the other gives it."""

    def forward(self, x: TokenInputs) -> Tensor:
        return 0.5 * (x.teacher_log_probs().exp() - x.student_log_probs().exp()).abs().sum(-1)


FORWARD_KL = spec_of(
    "forward-kl",
    ForwardKL,
    BOTH,
    Trait.ZERO_AT_MATCH,
    Trait.NON_NEGATIVE,
    Trait.SHIFT_INVARIANT,
    Trait.LINEAR_IN_TEACHER,
    suggests={"text": {"source": "teacher"}},
)
TOKEN_DPO_SPEC = spec_of("token-dpo", TokenWeightedDPO, PAIR_TOKENS, Trait.NON_NEGATIVE)
DPO_SPEC = spec_of("dpo", DPO, PAIRS, Trait.NON_NEGATIVE)
REINFORCE = spec_of("reinforce", Reinforce, DRAWN, Trait.SCORE_FUNCTION, Trait.SHIFT_INVARIANT)
SAMPLED = spec_of("sampled", Sampled, BOTH | {Signal.TARGETS}, Trait.SCORE_FUNCTION, Trait.SHIFT_INVARIANT)
VARIATION = spec_of(
    "variation", TotalVariation, BOTH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT, Trait.ACROSS_TOKENIZERS
)
TEMPERED = spec_of("tempered", Tempered, BOTH, Trait.NON_NEGATIVE, Trait.SHIFT_INVARIANT)
COPY = spec_of("copy", Copy, HIDDEN, Trait.ZERO_AT_MATCH, Trait.NON_NEGATIVE)

GOOD: list[tuple[LossSpec, Callable[..., Any] | None]] = [
    (FORWARD_KL, forward_kl_reference),
    (DPO_SPEC, dpo_reference),
    (TOKEN_DPO_SPEC, token_weighted_dpo_reference),
    (REINFORCE, reinforce_reference),
    (SAMPLED, None),
    (TEMPERED, None),
    (COPY, copy_reference),
    (VARIATION, None),
]
