"""Float64 oracles of the token losses, in plain Python loops over probabilities: no logarithm tricks, no torch.

Each takes one row of teacher logits `z_p`, student logits `z_q`, the target token and the loss's settings.
`reference` makes of it what `check_loss` compares with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Row = Sequence[float]
Oracle = Callable[[Row, Row, int, Any], float]


def reference(oracle: Oracle) -> Callable[..., Any]:
    """The oracle for all rows of a batch."""

    def values(
        *, student_logits: Any, teacher_logits: Any, config: Any, targets: Any = None, chosen_ids: Any = None
    ) -> Any:
        labels = [0] * len(student_logits) if targets is None else targets.tolist()
        rows = zip(teacher_logits.tolist(), student_logits.tolist(), labels, strict=True)
        return np.array([oracle(z_p, z_q, target, config) for z_p, z_q, target in rows])

    return values


def softmax(logits: Row, temperature: float = 1.0) -> list[float]:
    """Probabilities; -inf is 0."""
    top = max(logits)
    masses = [math.exp((z - top) / temperature) for z in logits]
    return [mass / sum(masses) for mass in masses]


def term(a: float, b: float) -> float:
    """a log(a/b), with 0 log 0/b = 0."""
    if a == 0:
        return 0.0
    return math.inf if b == 0 else a * math.log(a / b)


def divergence(p: Row, q: Row) -> float:
    """KL(p‖q)."""
    return sum(term(a, b) for a, b in zip(p, q, strict=True))


def mixture(p: Row, q: Row, weight: float) -> list[float]:
    """weight · p + (1 - weight) · q."""
    return [weight * a + (1 - weight) * b for a, b in zip(p, q, strict=True)]


def fkl(z_p: Row, z_q: Row, _: int, c: Any) -> float:
    value = divergence(softmax(z_p, c.temperature), softmax(z_q, c.temperature))
    return value * c.temperature * c.temperature if c.scale_by_t2 else value


def jensen_shannon(p: Row, q: Row, beta: float) -> float:
    if beta == 0:
        return divergence(p, q)
    if beta == 1:
        return divergence(q, p)
    m = mixture(p, q, beta)
    return beta * divergence(p, m) + (1 - beta) * divergence(q, m)


def jsd(z_p: Row, z_q: Row, _: int, c: Any) -> float:
    value = jensen_shannon(softmax(z_p, c.temperature), softmax(z_q, c.temperature), c.beta)
    return value / c.beta / (1 - c.beta) if c.rescale and 0 < c.beta < 1 else value


def gkd(z_p: Row, z_q: Row, _: int, c: Any) -> float:
    return jensen_shannon(softmax(z_p), softmax(z_q), c.beta)


def skl(z_p: Row, z_q: Row, _: int, c: Any) -> float:
    p, q = softmax(z_p), softmax(z_q)
    return divergence(p, mixture(p, q, c.skew))


def srkl(z_p: Row, z_q: Row, _: int, c: Any) -> float:
    p, q = softmax(z_p), softmax(z_q)
    return divergence(q, mixture(p, q, 1 - c.skew))


def tvd(z_p: Row, z_q: Row, _: int, c: Any) -> float:
    """What the teacher gives more to."""
    p, q = softmax(z_p, c.temperature), softmax(z_q, c.temperature)
    return sum(max(0.0, a - b) for a, b in zip(p, q, strict=True))


def symmetric_kl(z_p: Row, z_q: Row, _: int, c: Any) -> float:
    p, q = softmax(z_p, c.temperature), softmax(z_q, c.temperature)
    forward = (1 - c.reverse_weight) * divergence(p, q) if c.reverse_weight < 1 else 0.0
    return forward + (c.reverse_weight * divergence(q, p) if c.reverse_weight > 0 else 0.0)


def hellinger(z_p: Row, z_q: Row, _: int, c: Any) -> float:
    """One minus the Bhattacharyya coefficient."""
    p, q = softmax(z_p, c.temperature), softmax(z_q, c.temperature)
    return 1 - sum(math.sqrt(a * b) for a, b in zip(p, q, strict=True))


def power(base: float, exponent: float) -> float:
    """base^exponent, infinite where 0 is divided by."""
    return math.inf if base == 0 and exponent < 0 else base**exponent


def alpha_beta_of(p: float, q: float, a: float, b: float) -> float:
    """One token of the α-β divergence, or of its limit."""
    if p == 0 and q == 0:
        return 0.0
    if a == 0 and b == 0:
        return math.inf if 0 in (p, q) else 0.5 * math.log(q / p) ** 2
    if b == 0:
        return (term(p**a, q**a) - p**a + q**a) / a**2
    if a == 0:
        return (term(q**b, p**b) - q**b + p**b) / b**2
    if a + b == 0:
        return math.inf if 0 in (p, q) else (math.log(q**a / p**a) + (p / q) ** a - 1) / a**2
    cross = power(p, a) * power(q, b) if 0 not in (p, q) else (math.inf if power(p, a) + power(q, b) == math.inf else 0)
    return -(cross - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)) / (a * b)


def alpha_beta(z_p: Row, z_q: Row, _: int, c: Any) -> float:
    pairs = zip(softmax(z_p), softmax(z_q), strict=True)
    return sum(alpha_beta_of(p, q, c.alpha, c.beta) for p, q in pairs)


def topk_kl(z_p: Row, z_q: Row, _: int, c: Any) -> float:
    p, q = softmax(z_p), softmax(z_q)
    order = sorted(range(len(p)), key=lambda v: -z_p[v])
    kept, rest = order[: c.k], order[c.k :]
    a, b = [p[v] for v in kept], [q[v] for v in kept]
    if c.tail == "bucket":
        return divergence([*a, sum(p[v] for v in rest)], [*b, sum(q[v] for v in rest)])
    a, b = a[: len(a) - a.count(0)], b[: len(a) - a.count(0)]
    if sum(b) == 0:
        return math.inf
    return divergence([x / sum(a) for x in a], [x / sum(b) for x in b])


def _merged(z_p: Row, z_q: Row, k: int) -> tuple[list[float], list[float]]:
    """Probabilities of the student's k likeliest tokens, and of the rest as one token, under both."""
    p, q = softmax(z_p), softmax(z_q)
    order = sorted(range(len(q)), key=lambda v: -z_q[v])
    kept, rest = order[:k], order[k:]
    return [*(p[v] for v in kept), sum(p[v] for v in rest)], [*(q[v] for v in kept), sum(q[v] for v in rest)]


def topk_rkl(z_p: Row, z_q: Row, _: int, c: Any) -> float:
    p, q = _merged(z_p, z_q, c.k)
    return divergence(q, p)


def topk_rkl_sampled(z_p: Row, z_q: Row, target: int, c: Any) -> float:
    p, q = softmax(z_p), softmax(z_q)
    kept = sorted(range(len(q)), key=lambda v: -z_q[v])[: c.k]
    outside = 0.0 if target in kept else math.log(q[target] / p[target])
    return sum(term(q[v], p[v]) for v in kept) + outside


def topk_jsd(z_p: Row, z_q: Row, _: int, c: Any) -> float:
    p, q = _merged(z_p, z_q, c.k)
    return jensen_shannon(p, q, c.beta)


def todi(z_p: Row, z_q: Row, _: int, c: Any) -> float:
    value = 0.0
    for p, q in zip(softmax(z_p), softmax(z_q), strict=True):
        if p == 0 and q == 0:
            continue
        weight = p**c.beta / (p**c.beta + q**c.beta)
        value += (weight * term(p, q) if weight > 0 else 0.0) + ((1 - weight) * term(q, p) if weight < 1 else 0.0)
    return value


def dkd(z_p: Row, z_q: Row, target: int, c: Any) -> float:
    p, q = softmax(z_p, c.temperature), softmax(z_q, c.temperature)
    t = target if c.target == "response" else max(range(len(p)), key=lambda v: p[v])
    others_p, others_q = [p[v] for v in range(len(p)) if v != t], [q[v] for v in range(len(q)) if v != t]
    binary = divergence([p[t], sum(others_p)], [q[t], sum(others_q)])
    among = divergence([x / sum(others_p) for x in others_p], [x / sum(others_q) for x in others_q])
    return (c.alpha * binary if c.alpha else 0.0) + c.beta * among


def taid_target(z_p: Row, z_q: Row, t: float) -> list[float]:
    """The normalized weighted geometric mean of student and teacher."""
    masses = [b ** (1 - t) * a**t for a, b in zip(softmax(z_p), softmax(z_q), strict=True)]
    return [mass / sum(masses) for mass in masses]


def taid(z_p: Row, z_q: Row, _: int, c: Any) -> float:
    return divergence(taid_target(z_p, z_q, c.t), softmax(z_q))


def distillm(z_p: Row, z_q: Row, target: int, c: Any) -> float:
    return {"skl": skl, "srkl": srkl}[c.divergence](z_p, z_q, target, c)


def imitkd(z_p: Row, z_q: Row, _: int, c: Any) -> float:
    p, q = softmax(z_p), softmax(z_q)
    if c.target == "distribution":
        return divergence(p, q)
    chosen = q[max(range(len(p)), key=lambda v: p[v])]
    return -math.log(chosen) if chosen > 0 else math.inf


def logits_mse(z_p: Row, z_q: Row, *_: Any) -> float:
    """Each centred by itself, over the tokens that neither excludes."""
    if any((a == -math.inf) != (b == -math.inf) for a, b in zip(z_p, z_q, strict=True)):
        return math.inf
    p, q = ([z for z in row if z > -math.inf] for row in (z_p, z_q))
    centre_p, centre_q = sum(p) / len(p), sum(q) / len(q)
    return sum(((b - centre_q) - (a - centre_p)) ** 2 for a, b in zip(p, q, strict=True)) / (2 * len(p))


def bild(z_p: Row, z_q: Row, _: int, c: Any) -> float:
    value = 0.0
    for leader in (z_p, z_q):
        chosen = sorted(range(len(leader)), key=lambda v: -leader[v])[: c.k]
        if any((z_p[v] == -math.inf) != (z_q[v] == -math.inf) for v in chosen):
            return math.inf
        pairs = list(itertools.combinations([v for v in chosen if z_p[v] > -math.inf], 2))
        gaps = [[z[i] - z[j] for i, j in pairs] for z in (z_p, z_q)]
        if pairs:
            value += divergence(softmax(gaps[0], c.temperature), softmax(gaps[1], c.temperature))
    return value
