"""Pure tensor functions that losses are made of.

Shapes in names: N response positions, V vocabulary, B sequences or pairs. Everything is in nats.
`p` is the teacher, `q` the student: `kl(p, q)` is KL(p‖q), everywhere. Log-probabilities of zero (`-inf`) are
legal in either distribution and never put a NaN into a value or a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "KLSum",
    "aggregate",
    "at_least_float32",
    "by_segment",
    "cross_entropy",
    "entropy",
    "free_to_read",
    "gather_logps",
    "jensen_shannon",
    "kl",
    "layer_pairs",
    "leave_one_out",
    "log_mix",
    "log_softmax",
    "log_total",
    "nll",
    "preference",
    "reduce_loss",
    "returns_to_go",
    "segment_sum",
    "sorted_distance",
    "token_mask",
    "with_rest",
]


def at_least_float32(values: Tensor) -> Tensor:
    """Half-precision `values` as float32; float32 and float64 as they are.

    >>> at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def free_to_read(device: torch.device) -> bool:
    """Whether looking at a value on a `device` costs nothing: elsewhere the host waits for all that comes before it.

    >>> free_to_read(torch.device("cpu"))
    True
    """
    return device.type == "cpu" and not torch.compiler.is_compiling()


def log_softmax(logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities `[N, V]` of logits `logits_NV` at a `temperature`, in at least float32.

    >>> log_softmax(torch.zeros(1, 4)).exp()
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    logits_NV = at_least_float32(logits_NV)
    return F.log_softmax(logits_NV if temperature == 1.0 else logits_NV / temperature, dim=-1)


def _expected(p_NV: Tensor, log_NV: Tensor) -> Tensor:
    """`Σ p · log` `[N]`, with 0 · (-inf) = 0 in the value and in both gradients."""
    if free_to_read(p_NV.device):  # looking saves three passes
        value_N = _dot(p_NV, log_NV)
        if bool(value_N.detach().isfinite().all()):
            return value_N
    # -inf minus -inf is NaN, but a difference has a constant derivative: masking its value is enough.
    return _dot(p_NV, log_NV.masked_fill(p_NV == 0, 0.0))


def _dot(one_NV: Tensor, other_NV: Tensor) -> Tensor:
    """`Σ one · other` `[N]` in their own type: for autocast it is a product, which it would take in half precision."""
    if one_NV.device.type == "meta":  # has no autocast
        return (one_NV * other_NV).sum(-1)
    with torch.autocast(one_NV.device.type, enabled=False):
        return torch.linalg.vecdot(one_NV, other_NV)  # type: ignore[no-any-return]


def kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """KL(p‖q) `[N]` in nats, from log-probabilities `log_p_NV` and `log_q_NV`.

    Infinite where p has mass on a token to which q gives none.

    >>> log_p, log_q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    >>> kl(log_p, log_q)                                    # 0.5 · ln 2
    tensor([0.3466])
    >>> kl(log_q, log_p)
    tensor([inf])
    """
    p_NV = log_p_NV.exp()
    return _expected(p_NV, log_p_NV - log_q_NV)


def entropy(log_p_NV: Tensor) -> Tensor:
    """Entropy `[N]` in nats of log-probabilities `log_p_NV`.

    >>> entropy(torch.tensor([[0.5, 0.5, 0.0]]).log())
    tensor([0.6931])
    """
    return -_expected(log_p_NV.exp(), log_p_NV)


def cross_entropy(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """`-Σ p log q` `[N]` in nats, from log-probabilities `log_p_NV` and `log_q_NV`: KL(p‖q) plus the entropy of p.

    >>> log_p = torch.tensor([[0.5, 0.5]]).log()
    >>> cross_entropy(log_p, log_p)
    tensor([0.6931])
    """
    return -_expected(log_p_NV.exp(), log_q_NV)


def gather_logps(log_q_NV: Tensor, ids_N: Tensor) -> Tensor:
    """Log-probability `[N]` of one token `ids_N` per position, from log-probabilities `log_q_NV`.

    >>> gather_logps(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([1])).exp()
    tensor([0.7500])
    """
    return log_q_NV.gather(-1, ids_N.unsqueeze(-1)).squeeze(-1)


def nll(log_q_NV: Tensor, ids_N: Tensor) -> Tensor:
    """Negative log-likelihood `[N]` in nats of one token `ids_N` per position, from log-probabilities `log_q_NV`."""
    return -gather_logps(log_q_NV, ids_N)


def with_rest(log_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Log-probabilities of the tokens `ids_NK` and, last, of all others together `[N, K+1]`, from all `log_NV`.

    >>> with_rest(torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0]])).exp()
    tensor([[0.5000, 0.5000]])
    """
    # Summing what is left, not 1 - Σ: that would be rounding where the K tokens hold nearly all.
    rest_N = log_total(log_NV.scatter(-1, ids_NK, -math.inf))
    return torch.cat([log_NV.gather(-1, ids_NK), rest_N.unsqueeze(-1)], dim=-1)


def log_mix(log_a_NV: Tensor, log_b_NV: Tensor, weight_a: float | Tensor) -> Tensor:
    """Log of the mixture `weight_a · a + (1 - weight_a) · b`, in log space.

    log_a_NV  log-probabilities of a, and `log_b_NV` those of b
    weight_a  the weight of a, in [0, 1]; ValueError otherwise. A tensor `[N, 1]` has that of each row, unchecked

    >>> log_mix(torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log(), 0.25).exp()
    tensor([0.2500, 0.7500])
    """
    if isinstance(weight_a, Tensor):
        a_NV, b_NV = log_a_NV + weight_a.log(), log_b_NV + (-weight_a).log1p()
    elif not 0.0 <= weight_a <= 1.0:
        raise ValueError(f"a mixture weight lies in [0, 1], got {weight_a}")
    elif weight_a == 0.0:
        return log_b_NV
    elif weight_a == 1.0:
        return log_a_NV
    else:
        a_NV, b_NV = log_a_NV + math.log(weight_a), log_b_NV + math.log1p(-weight_a)
    # Where both are -inf, logaddexp has no gradient: the token stays impossible.
    impossible_NV = (a_NV == -math.inf) & (b_NV == -math.inf)
    # Looking saves two passes.
    if free_to_read(impossible_NV.device) and not impossible_NV.any():
        return torch.logaddexp(a_NV, b_NV)
    mixed = torch.logaddexp(a_NV.masked_fill(impossible_NV, 0.0), b_NV.masked_fill(impossible_NV, 0.0))
    return mixed.masked_fill(impossible_NV, -math.inf)


def jensen_shannon(log_p_NV: Tensor, log_q_NV: Tensor, beta: float) -> Tensor:
    """`β KL(p‖m) + (1-β) KL(q‖m)` with `m = β p + (1-β) q`, `[N]` in nats: GKD's generalised divergence (2306.13649).

    At most the entropy of the coin (β, 1-β); 0 for β = 0 and β = 1.

    log_p_NV  log-probabilities of the teacher, and `log_q_NV` those of the student
    beta      β, in [0, 1]; ValueError otherwise

    >>> log_p, log_q = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.0, 1.0]]).log()
    >>> jensen_shannon(log_p, log_q, 0.5)                   # apart: ln 2
    tensor([0.6931])
    """
    log_m_NV = log_mix(log_p_NV, log_q_NV, beta)
    return beta * kl(log_p_NV, log_m_NV) + (1 - beta) * kl(log_q_NV, log_m_NV)


@dataclass(frozen=True)
class KLSum:
    """`forward · KL(p‖m) + reverse · KL(q‖m') - likelihood · log q(y)`: what fused kernels compute in one go.

    forward        factor of each term; `reverse` and `likelihood` likewise
    forward_share  m = forward_share · p + (1 - forward_share) · q, and m' likewise with `reverse_share`
    temperature    of p and q
    parts          names of the three terms before their factors, for the log; None: not named
    """

    forward: float = 0.0
    reverse: float = 0.0
    likelihood: float = 0.0
    forward_share: float = 0.0
    reverse_share: float = 1.0
    temperature: float = 1.0
    parts: tuple[str | None, str | None, str | None] = (None, None, None)

    @property
    def reads_teacher(self) -> bool:
        """Whether there is a divergence in it."""
        return self.forward != 0 or self.reverse != 0

    def terms(self, log_p_NV: Tensor, log_q_NV: Tensor, ids_N: Tensor) -> tuple[Tensor | None, ...]:
        """The three terms `[N]` in nats before their factors; None where the factor is 0 (an infinite one is no NaN).

        log_p_NV  log-probabilities of the teacher, and `log_q_NV` those of the student
        ids_N     the token of each position, for the likelihood

        >>> log_p, log_q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> KLSum(forward=0.5, likelihood=0.5).terms(log_p, log_q, torch.tensor([0]))
        (tensor([0.1438]), None, tensor([1.3863]))
        """
        return (
            kl(log_p_NV, log_mix(log_p_NV, log_q_NV, self.forward_share)) if self.forward else None,
            kl(log_q_NV, log_mix(log_p_NV, log_q_NV, self.reverse_share)) if self.reverse else None,
            nll(log_q_NV, ids_N) if self.likelihood else None,
        )

    def value(self, log_p_NV: Tensor, log_q_NV: Tensor, ids_N: Tensor) -> Tensor:
        """The sum `[N]` in nats, of the terms that `terms` computes from `log_p_NV`, `log_q_NV` and `ids_N`."""
        factors = (self.forward, self.reverse, self.likelihood)
        terms = self.terms(log_p_NV, log_q_NV, ids_N)
        found = [factor * term for factor, term in zip(factors, terms, strict=True) if term is not None]
        return torch.stack(found).sum(0)


def log_total(log_NV: Tensor) -> Tensor:
    """Log of the summed mass of each row `[N]` of `log_NV`; -inf, without a NaN in the gradient, where it is zero.

    >>> log_total(torch.tensor([[0.25, 0.5, 0.0], [0.0, 0.0, 0.0]]).log()).exp()
    tensor([0.7500, 0.0000])
    """
    none_N1 = (log_NV == -math.inf).all(-1, keepdim=True)
    total_N: Tensor = log_NV.masked_fill(none_N1, 0.0).logsumexp(-1)
    return total_N.masked_fill(none_N1.squeeze(-1), -math.inf)


def layer_pairs(how: str, student: int, teacher: int) -> list[tuple[int, int]]:
    """Pairs of hidden states (student's, teacher's) for a loss that compares layers.

    how      `last`: the last layer of each model; `even`: all layers of the student
    student  the number of layers of the student, and `teacher` that of the teacher

    `even` gives each layer of the student the teacher's at the same share of the depth, rounded up (TinyBERT,
    1909.10351, §4.2: the uniform mapping). State 0, the embedding, is in neither.

    >>> layer_pairs("even", 3, 12), layer_pairs("even", 2, 5), layer_pairs("last", 2, 5)
    ([(1, 4), (2, 8), (3, 12)], [(1, 3), (2, 5)], [(2, 5)])
    """
    if how == "last":
        return [(student, teacher)]
    return [(i, -(-i * teacher // student)) for i in range(1, student + 1)]


def aggregate(logps_B: Tensor, lengths_B: Tensor, how: str) -> Tensor:
    """Summed log-probs `[B]` of responses, as a sum or per token.

    logps_B    log-probs in nats, summed over the tokens of each response
    lengths_B  tokens of each response
    how        `sum` returns the log-probs unchanged; `mean` divides them by the lengths

    >>> aggregate(torch.tensor([-6.0]), torch.tensor([3.0]), "mean")
    tensor([-2.])
    """
    return logps_B / lengths_B if how == "mean" else logps_B


def preference(margin_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """`-(1-ε) log σ(margin) - ε log σ(-margin)` `[B]` of margins `margin_B`: Bradley-Terry.

    `label_smoothing` is ε, the share of pairs whose labels are assumed to be flipped.

    >>> preference(torch.tensor([0.0]))
    tensor([0.6931])
    """
    loss_B = -F.logsigmoid(margin_B)
    if label_smoothing == 0.0:
        return loss_B
    return (1 - label_smoothing) * loss_B - label_smoothing * F.logsigmoid(-margin_B)


def sorted_distance(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """`Σ_i |p_(i) - q_(i)|` `[N]` of probabilities `p_NV` and `q_NV` in descending order (ULD, 2402.12030).

    Which token has which probability does not matter, and the two vocabularies may differ in size. Where one side has
    no mass left, the other needs no order: what is left of it is added up.

    >>> sorted_distance(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.0, 0.25, 0.75]]))
    tensor([0.5000])
    """
    fewest = min((int((mass_NV > 0).sum(-1).max()) for mass_NV in (p_NV, q_NV)), default=0) if len(p_NV) else 0
    first_NK, second_NK = (torch.topk(mass_NV, fewest, dim=-1).values for mass_NV in (p_NV, q_NV))
    left_N = (p_NV.sum(-1) - first_NK.sum(-1)) + (q_NV.sum(-1) - second_NK.sum(-1))
    return (first_NK - second_NK).abs().sum(-1) + left_N


def segment_sum(values_N: Tensor, segment_N: Tensor, count: int) -> Tensor:
    """Sum of the values `values_N` of each of `count` segments; `segment_N` has the segment of each value, from 0.

    >>> segment_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 2]), 3)
    tensor([3., 0., 4.])
    """
    return values_N.new_zeros(count).index_add(0, segment_N, values_N)


def by_segment(values_N: Tensor, segment_N: Tensor, lengths_B: Tensor, longest: int) -> Tensor:
    """The values of each segment in a row of its own, `[B, longest]`, and 0 behind its last.

    values_N   the values of all segments, and `segment_N` the ascending number of the segment of each
    lengths_B  how many values each segment has, `longest` at most

    >>> by_segment(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 2]), torch.tensor([2, 0, 1]), 2)
    tensor([[1., 2.],
            [0., 0.],
            [4., 0.]])
    """
    first_B = lengths_B.cumsum(0) - lengths_B
    column_N = torch.arange(len(values_N), device=values_N.device) - first_B[segment_N]
    return values_N.new_zeros(len(lengths_B), longest).index_put((segment_N, column_N), values_N)


def token_mask(lengths_B: Tensor, longest: int) -> Tensor:
    """Whether a place holds a token, `[B, longest]`, bool; `lengths_B` are the tokens of each of the B sequences.

    `longest` is the number of places.

    >>> token_mask(torch.tensor([2.0, 1.0]), 3).int()
    tensor([[1, 1, 0],
            [1, 0, 0]], dtype=torch.int32)
    """
    return torch.arange(longest, device=lengths_B.device) < lengths_B.unsqueeze(-1)


def leave_one_out(values_R: Tensor, group_R: Tensor) -> Tensor:
    """Each of `values_R` less the mean of the others of its group, `[R]`; alone in its group, as it is.

    `group_R` has the number of the group of each value, from 0.

    >>> leave_one_out(torch.tensor([1.0, 2.0, 6.0, 5.0]), torch.tensor([0, 0, 0, 1]))
    tensor([-3.0000, -1.5000,  4.5000,  5.0000])
    """
    groups = int(group_R.max()) + 1 if len(group_R) else 0
    others_R = segment_sum(torch.ones_like(values_R), group_R, groups)[group_R] - 1
    return values_R - (segment_sum(values_R, group_R, groups)[group_R] - values_R) / others_R.clamp(min=1)


def reduce_loss(values: Tensor, count: float | Tensor, weight: float = 1.0) -> Tensor:
    """`weight · Σ values / count`, a scalar: the only division of a loss in dpkd.

    values  of positions or pairs
    count   the number of positions or pairs of the whole optimizer step, over all micro-batches and processes: not
            only of these values. Below 1 it counts as 1, so that a step without any is worth 0
    weight  of the loss in the run

    >>> reduce_loss(torch.tensor([1.0, 3.0]), 8), reduce_loss(torch.tensor([]), 0)
    (tensor(0.5000), tensor(0.))
    """
    items = count.to(values.dtype).clamp(min=1) if isinstance(count, Tensor) else max(1, count)
    total: Tensor = values.sum() * (weight / items)
    return total


def returns_to_go(rewards_N: Tensor, sequence_N: Tensor, discount: float = 1.0) -> Tensor:
    """Discounted sum of the rewards from each position to the end of its sequence, `[N]`.

    rewards_N   the reward of each position
    sequence_N  the number of its sequence; rows of one sequence stand together and in order
    discount    factor from one position to the next

    >>> returns_to_go(torch.tensor([1.0, 1.0, 1.0, 5.0]), torch.tensor([0, 0, 0, 1]), 0.5)
    tensor([1.7500, 1.5000, 1.0000, 5.0000])
    """
    returns = rewards_N.tolist()
    sequence = sequence_N.tolist()
    for i in range(len(returns) - 2, -1, -1):
        if sequence[i] == sequence[i + 1]:
            returns[i] += discount * returns[i + 1]
    return rewards_N.new_tensor(returns)
