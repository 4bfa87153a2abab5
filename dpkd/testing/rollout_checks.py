"""Checks of losses whose gradient is right in expectation only, by enumerating everything that could be drawn.

The toy policy has three tokens, the first of which ends a response, and responses of at most three tokens (one for a
token loss): few enough to visit them all. A table of logits, one row for each prefix, is the student; another is the
teacher. R responses, T tokens of one of them, N = tokens of all of them, P prefixes, V vocabulary.

`objective(student_logps, teacher_logps, config)` is what the loss descends, to be given by an author for whom that is
not the reverse KL of whole responses. It gets two lists with the log-probs `[T]` of the tokens of each possible
response, the student's with gradient, and returns a scalar. For a token loss every response is one token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpkd.api import Family, Loss, Rollout, RolloutLoss, Signal, Trait
from dpkd.functional import gather_logps
from dpkd.testing.inputs import SampleBatch, rollout_of
from dpkd.testing.results import CheckSkipped, CheckWarned
from dpkd.testing.subject import FOUNDATION, Check, LossUnderTest, fail, require, require_close

TOKENS, END, LONGEST = 3, 0, 3


def one_advantage_per_token(subject: LossUnderTest) -> None:
    """`advantages` gives a finite worth `[N]` to every drawn token, and nothing for an empty collection."""
    loss = subject.build()
    assert isinstance(loss, RolloutLoss)
    batch = subject.batch(seed=14)
    for rows in (6, 1, 0):
        with torch.no_grad():
            worth_N = loss.advantages(rollout_of(batch.take(slice(0, rows))))
        found = list(worth_N.shape)
        require(found == [rows], f"advantages of {rows} tokens have shape {found}, expected [{rows}]")
        require(bool(worth_N.isfinite().all()), f"advantages of {rows} tokens are not finite on ordinary inputs")


def expected_gradient(subject: LossUnderTest) -> None:
    """The surrogate's gradient, summed over every possible response times its probability, is the objective's.

    Without `objective=` it is compared with that of the reverse KL of whole responses: equal passes, of the same
    direction by and large warns, anything else fails (a flipped sign, a log-ratio without the score function).
    """
    if Signal.REWARDS in subject.reads:
        raise CheckSkipped("its advantages follow from rewards, which the kit cannot know: test them by hand")
    given = subject.objective is not None
    for seed in range(2):
        toy = _toy(longest=LONGEST if subject.spec.family is Family.ROLLOUT else 1, seed=seed)
        found, wanted = _surrogate_gradient(subject, toy), _objective_gradient(subject, toy)
        message = "the expected gradient of the surrogate is not that of the objective"
        if given or torch.allclose(found, wanted, atol=1e-6, rtol=1e-4):
            require_close(found, wanted, message, atol=1e-6)
            continue
        cosine = torch.cosine_similarity(found.flatten(), wanted.flatten(), dim=0).item()
        if found.abs().max() < 1e-6 or cosine <= 0:
            fail(
                f"{message}: its cosine with the gradient of the reverse KL of whole responses is {cosine:.3f}. Is the "
                "sign flipped, or the log-ratio used without the score function? If the loss descends something else, "
                "pass it as objective="
            )
        raise CheckWarned(
            f"the expected gradient is not that of the reverse KL of whole responses (cosine {cosine:.3f}); pass what "
            "the loss descends as objective= to have it proved"
        )


@dataclass(frozen=True)
class Toy:
    """Every response, and the two policies that could have written it."""

    responses: tuple[tuple[int, ...], ...]
    student_PV: Tensor
    teacher_PV: Tensor
    prefix_N: Tensor
    ids_N: Tensor
    response_N: Tensor

    def split(self, values_N: Tensor) -> list[Tensor]:
        """The tokens of each response."""
        return list(values_N.split([len(y) for y in self.responses]))


def _toy(longest: int, seed: int) -> Toy:
    drawn = itertools.product(range(TOKENS), repeat=longest)
    responses = sorted({y[: y.index(END) + 1] if END in y else y for y in drawn})
    prefixes = sorted({y[:t] for y in responses for t in range(len(y))})
    generator = torch.Generator().manual_seed(seed)
    student_PV, teacher_PV = (
        torch.randn(len(prefixes), TOKENS, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    place = {prefix: i for i, prefix in enumerate(prefixes)}
    return Toy(
        tuple(responses),
        student_PV,
        teacher_PV,
        prefix_N=torch.tensor([place[y[:t]] for y in responses for t in range(len(y))]),
        ids_N=torch.tensor([token for y in responses for token in y]),
        response_N=torch.tensor([i for i, y in enumerate(responses) for _ in y]),
    )


def _surrogate_gradient(subject: LossUnderTest, toy: Toy) -> Tensor:
    """Σ_y q(y) ∇ Σ_t value_t, `[P, V]`: responses drawn by the student itself, just now."""
    table_PV = toy.student_PV.clone().requires_grad_()
    loss = subject.build(torch.float64)
    logits_NV, teacher_NV = table_PV[toy.prefix_N], toy.teacher_PV[toy.prefix_N]
    log_q_N = gather_logps(logits_NV.detach().log_softmax(-1), toy.ids_N)
    log_p_N = gather_logps(teacher_NV.log_softmax(-1), toy.ids_N)
    signals = {
        Signal.STUDENT_LOGITS: logits_NV,
        Signal.TEACHER_LOGITS: teacher_NV,
        Signal.TARGETS: toy.ids_N,
        Signal.ROLLOUT_LOGPS: log_q_N,
        Signal.BEHAVIOUR_LOGPS: log_q_N,
        Signal.TEACHER_LOGPS: log_p_N,
        Signal.ADVANTAGES: _advantages(loss, Rollout(log_q_N, log_q_N, log_p_N, toy.response_N)),
    }
    values_N = subject.values(SampleBatch(subject.spec.family, signals), loss)
    probability_R = torch.stack([part.sum().exp() for part in toy.split(log_q_N)])
    (values_N * probability_R[toy.response_N]).sum().backward()
    assert table_PV.grad is not None
    return table_PV.grad


def _advantages(loss: Loss, rollout: Rollout) -> Tensor:
    if not isinstance(loss, RolloutLoss):
        return torch.zeros_like(rollout.rollout_logps)
    with torch.no_grad():
        return loss.advantages(rollout)


def _objective_gradient(subject: LossUnderTest, toy: Toy) -> Tensor:
    table_PV = toy.student_PV.clone().requires_grad_()
    log_q_N = gather_logps(table_PV[toy.prefix_N].log_softmax(-1), toy.ids_N)
    log_p_N = gather_logps(toy.teacher_PV[toy.prefix_N].log_softmax(-1), toy.ids_N)
    objective = subject.objective or sequence_reverse_kl
    value = objective(toy.split(log_q_N), toy.split(log_p_N), subject.config)
    require(isinstance(value, Tensor) and value.requires_grad, "the objective should return a tensor with a gradient")
    (gradient,) = torch.autograd.grad(value, table_PV)
    return gradient


def sequence_reverse_kl(student_logps: Sequence[Tensor], teacher_logps: Sequence[Tensor], config: object) -> Tensor:
    """Σ_y q(y) (log q(y) - log p(y)) in nats, from the log-probs `[T]` of every possible response."""
    terms = [q.sum().exp() * (q.sum() - p.sum()) for q, p in zip(student_logps, teacher_logps, strict=True)]
    return torch.stack(terms).sum()


CHECKS = (
    Check(one_advantage_per_token, families=frozenset({Family.ROLLOUT})),
    Check(
        expected_gradient,
        families=frozenset({Family.TOKEN, Family.ROLLOUT}),
        trait=Trait.SCORE_FUNCTION,
        requires=(*FOUNDATION, "one_advantage_per_token"),
    ),
)
