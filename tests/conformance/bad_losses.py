"""Losses with one bug each, most of them found in published code, under the check that must see it.

A new bug found anywhere becomes a loss here first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from good_losses import BOTH, DPO_SPEC, PAIR_TOKENS, PAIRS, Settings, forward_kl_reference, loss_class, spec_of
from torch import Tensor, nn

from dpkd.api import LossConfig, LossSpec, PairLoss, Signal, TokenLoss, Trait
from dpkd.functional import KLSum, cross_entropy, gather_logps, kl

HARD = frozenset({Signal.STUDENT_LOGITS, Signal.TARGETS})


@dataclass(frozen=True)
class Bad:
    """A loss, the one check that must fail, and what else the kit is told."""

    check: str
    name: str
    spec: LossSpec
    told: dict[str, Any]


BAD: list[Bad] = []


def bad(
    check: str,
    *traits: Trait,
    base: type[Any] = TokenLoss,
    reads: frozenset[Signal] = BOTH,
    members: dict[str, Any] | None = None,
    **told: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The decorated function is the forward of a bad loss."""

    def note(forward: Callable[..., Any]) -> Callable[..., Any]:
        spec = spec_of(forward.__name__.replace("_", "-"), loss_class(base, forward, **(members or {})), reads, *traits)
        BAD.append(Bad(check, forward.__name__, spec, told))
        return forward

    return note


def bad_spec(check: str, name: str, spec: LossSpec, **told: Any) -> None:
    """A bad loss that is one by its spec."""
    BAD.append(Bad(check, name, spec, told))


# --- shape and memory


@bad("padding_changes_nothing", base=PairLoss, reads=PAIR_TOKENS - {Signal.LENGTHS})
def mean_over_padding(self: Any, x: Any) -> Tensor:
    """A mean over T: shorter responses count for less, the wider their batch is."""
    gaps = [(q - p).mean(-1) for q, p in zip(x.student_token_logps, x.teacher_token_logps, strict=True)]
    return F.softplus(gaps[1] - gaps[0])


@bad("one_value_per_position")
def mean_inside(self: Any, x: Any) -> Tensor:
    """TRL before #6006."""
    return kl(x.teacher_log_probs(), x.student_log_probs()).mean()


@bad("one_value_per_position")
def squeezed(self: Any, x: Any) -> Tensor:
    """Right for every batch but one."""
    return kl(x.teacher_log_probs(), x.student_log_probs()).squeeze()


@bad("one_value_per_position", reads=PAIRS, base=PairLoss)
def half_result(self: Any, x: Any) -> Tensor:
    return (x.teacher.chosen - x.student.chosen + x.teacher.rejected).bfloat16()


@bad("deterministic")
def dropout(self: Any, x: Any) -> Tensor:
    return kl(x.teacher_log_probs(), F.dropout(x.student_logits, 0.5).log_softmax(-1))


@bad("deterministic")
def memory(self: Any, x: Any) -> Tensor:
    """Keeps a moving average of what it saw."""
    values_N = kl(x.teacher_log_probs(), x.student_log_probs())
    self.seen = 0.9 * getattr(self, "seen", 1.0) + 0.1 * values_N.detach().mean()
    return values_N / self.seen


@bad("no_positions")
def detached_zero(self: Any, x: Any) -> Tensor:
    """torchtune's ForwardKLWithChunkedOutputLoss when every label is masked."""
    if len(x.student_logits) == 0:
        return torch.zeros(0)
    return kl(x.teacher_log_probs(), x.student_log_probs())


@bad("no_positions", reads=HARD)
def maximum_of_nothing(self: Any, x: Any) -> Tensor:
    assert x.targets.max() < x.student_logits.shape[-1]
    return -gather_logps(x.student_log_probs(), x.targets)


@bad("positions_are_independent")
def micro_batch_denominator(self: Any, x: Any) -> Tensor:
    """Divides by the micro-batch's own count."""
    values_N = kl(x.teacher_log_probs(), x.student_log_probs())
    return values_N / max(len(values_N), 1)


@bad("positions_are_independent", reads=PAIRS, base=PairLoss)
def centred_over_the_batch(self: Any, x: Any) -> Tensor:
    margin_B = x.student.chosen - x.student.rejected - x.teacher.chosen + x.teacher.rejected
    return F.softplus(margin_B.mean() - margin_B)


@bad("inputs_are_left_alone")
def divided_in_place(self: Any, x: Any) -> Tensor:
    """`logits /= temperature` on a tensor that others still read."""
    return kl(x.teacher_logits.div_(2.0).log_softmax(-1), x.student_log_probs(2.0))


@bad("inputs_are_left_alone")
def shared_log_probs_changed(self: Any, x: Any) -> Tensor:
    log_p_NV = x.teacher_log_probs()
    values_N = kl(log_p_NV.clone(), x.student_log_probs())
    log_p_NV.exp_()
    return values_N


# --- numbers


@bad("finite_on_extreme_logits", reads=HARD)
def hand_made_logsumexp(self: Any, x: Any) -> Tensor:
    return x.student_logits.exp().sum(-1).log() - gather_logps(x.student_logits, x.targets)


@bad("finite_on_extreme_logits", reads=PAIRS, base=PairLoss)
def log_of_sigmoid(self: Any, x: Any) -> Tensor:
    margin_B = x.student.chosen - x.teacher.chosen - x.student.rejected + x.teacher.rejected
    return -(margin_B / 4).sigmoid().log()


@bad("excluded_tokens_give_no_nan")
def zero_times_infinity(self: Any, x: Any) -> Tensor:
    log_p_NV, log_q_NV = x.teacher_log_probs(), x.student_log_probs()
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


@bad("excluded_tokens_give_no_nan")
def masked_after(self: Any, x: Any) -> Tensor:
    """TRL #5594: the value is saved and the gradient is not."""
    log_p_NV, log_q_NV = x.teacher_log_probs(), x.student_log_probs()
    terms_NV = log_q_NV.exp() * (log_q_NV - log_p_NV)
    return torch.where(log_q_NV > -torch.inf, terms_NV, 0.0).sum(-1)


@bad("bfloat16_inputs")
def softmax_in_bfloat16(self: Any, x: Any) -> Tensor:
    log_q_NV, log_p_NV = (F.log_softmax(x[s], -1).float() for s in (Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS))
    return kl(log_p_NV, log_q_NV)


# --- gradient


@bad("gradient_reaches_the_student_only")
def no_grad_left_on(self: Any, x: Any) -> Tensor:
    with torch.no_grad():
        return kl(x.teacher_log_probs(), x.student_log_probs())


@bad("gradient_reaches_the_student_only")
def trains_the_teacher(self: Any, x: Any) -> Tensor:
    teacher_NV = x[Signal.TEACHER_LOGITS].requires_grad_()
    return kl(teacher_NV.log_softmax(-1), x.student_log_probs())


@bad("gradient_is_the_derivative")
def stray_detach(self: Any, x: Any) -> Tensor:
    """The reverse KL without the gradient of its own weights."""
    log_q_NV = x.student_log_probs()
    return (log_q_NV.detach().exp() * (log_q_NV - x.teacher_log_probs()).masked_fill(log_q_NV == -torch.inf, 0)).sum(-1)


class _Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] / 2


@bad("gradient_is_the_derivative", reads=PAIRS, base=PairLoss)
def wrong_backward(self: Any, x: Any) -> Tensor:
    ratio_B = x.student.chosen - x.student.rejected - x.teacher.chosen + x.teacher.rejected
    return F.softplus(-_Half.apply(ratio_B))


@bad("short_run_lowers_the_loss", Trait.DETACHED_WEIGHTS)
def climbs(self: Any, x: Any) -> Tensor:
    """The value of a divergence, and the gradient of its negative, excused by a trait."""
    values_N = kl(x.teacher_log_probs(), x.student_log_probs())
    return torch.where(values_N.isinf(), values_N, 2 * values_N.detach() - values_N)


# --- weights


def _with_offset(self: Any, config: LossConfig) -> None:
    TokenLoss.__init__(self, config)
    self.register_buffer("offset", torch.rand(()), persistent=False)


@bad("state_dict_round_trip", members={"__init__": _with_offset})
def random_state_not_saved(self: Any, x: Any) -> Tensor:
    return kl(x.teacher_log_probs(), (x.student_logits * (1 + self.offset)).log_softmax(-1))


def _with_scale(self: Any, config: LossConfig) -> None:
    TokenLoss.__init__(self, config)
    self.scale = nn.Parameter(torch.ones(()))


@bad("weights_train", members={"__init__": _with_scale})
def weight_without_gradient(self: Any, x: Any) -> Tensor:
    return kl(x.teacher_log_probs(), (x.student_logits * self.scale.detach()).log_softmax(-1))


@bad("kl_sum_says_the_same", members={"kl_sum": lambda self: KLSum(reverse=1.0)})
def direction_mistaken(self: Any, x: Any) -> Tensor:
    return kl(x.teacher_log_probs(), x.student_log_probs())


# --- traits


@bad("zero_at_match", Trait.ZERO_AT_MATCH)
def cross_entropy_called_kl(self: Any, x: Any) -> Tensor:
    """torchtune pins 1.7209 for its ForwardKLLoss: the cross-entropy."""
    return cross_entropy(x.teacher_log_probs(), x.student_log_probs())


@bad("zero_at_match", Trait.ZERO_AT_MATCH)
def padded_vocabulary(self: Any, x: Any) -> Tensor:
    """The student's vocabulary padded with zeros, the teacher's not: mass of its own at match."""
    padded_NV = torch.cat([x.student_logits, torch.zeros(len(x.student_logits), 3)], dim=1)
    return kl(x.teacher_log_probs(), padded_NV.log_softmax(-1)[:, :-3])


@bad("stationary_at_match", Trait.STATIONARY_AT_MATCH, reads=BOTH | {Signal.TARGETS})
def hard_loss_mixed_in(self: Any, x: Any) -> Tensor:
    """Liger mixes a hard loss in unasked (TRL #5731)."""
    log_q_NV = x.student_log_probs()
    return 0.9 * kl(x.teacher_log_probs(), log_q_NV) - 0.1 * gather_logps(log_q_NV, x.targets)


@bad("non_negative", Trait.NON_NEGATIVE)
def clipped_per_token(self: Any, x: Any) -> Tensor:
    """A clip for each token of the vocabulary makes a KL negative (TRL #4935)."""
    p_NV = x.teacher_log_probs().exp()
    ratio_NV = (x.teacher_log_probs() - x.student_log_probs()).masked_fill(p_NV == 0, 0.0)
    return (p_NV * torch.where(ratio_NV.detach() > 1.0, 0.1 * ratio_NV, ratio_NV)).sum(-1)


@bad("shift_invariant", Trait.SHIFT_INVARIANT)
def penalty_on_logits(self: Any, x: Any) -> Tensor:
    return kl(x.teacher_log_probs(), x.student_log_probs()) + 0.1 * x.student_logits[:, 0] ** 2


@bad("linear_in_the_teacher", Trait.LINEAR_IN_TEACHER)
def reverse_kl_on_samples(self: Any, x: Any) -> Tensor:
    """log p of an empirical distribution is biased: reverse KL cannot be had from samples of the teacher."""
    return kl(x.student_log_probs(), x.teacher_log_probs())


@bad("finite_with_two_vocabularies", Trait.ACROSS_TOKENIZERS)
def kl_over_two_vocabularies(self: Any, x: Any) -> Tensor:
    """Infinite: the teacher has tokens that the student has not."""
    return kl(x.teacher_log_probs(), x.student_log_probs())


# --- against the paper


@bad("matches_reference", Trait.NON_NEGATIVE, Trait.ZERO_AT_MATCH, reference=forward_kl_reference)
def wrong_way_round(self: Any, x: Any) -> Tensor:
    return kl(x.student_log_probs(), x.teacher_log_probs())


@bad("matches_reference", Trait.NON_NEGATIVE, Trait.ZERO_AT_MATCH, reference=forward_kl_reference)
def mean_over_the_vocabulary(self: Any, x: Any) -> Tensor:
    return kl(x.teacher_log_probs(), x.student_log_probs()) / x.student_logits.shape[-1]


def _smoothed_reference(student: Any, teacher: Any, config: Settings) -> Any:
    return (student[0] - student[1] - teacher[0] + teacher[1]) ** 2


bad_spec("matches_reference", "another_objective", DPO_SPEC, reference=_smoothed_reference)
