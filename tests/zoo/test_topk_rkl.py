"""The losses on the student's likeliest tokens: loops over tokens, the bias against the dense loss, and no bias."""

from __future__ import annotations

import pytest
import torch
from dpkd_zoo import topk_jsd, topk_rkl, topk_rkl_sampled
from oracles_token import reference
from oracles_token import topk_jsd as topk_jsd_loops
from oracles_token import topk_rkl as topk_rkl_loops
from oracles_token import topk_rkl_sampled as sampled_loops
from zoo_inputs import randn, token_inputs

from dpkd.api import TeacherAccess
from dpkd.functional import jensen_shannon, kl
from dpkd.testing import check_loss

STUDENT, TEACHER = randn(4, 9, seed=1), randn(4, 9, seed=2)
LOG_P, LOG_Q = TEACHER.log_softmax(-1), STUDENT.log_softmax(-1)


def _value(module, student, k, targets=None, **settings):
    spec = module.SPEC
    return spec.loss(spec.config(k=k, **settings))(token_inputs(student, TEACHER, targets))


@pytest.mark.parametrize("k", [1, 3, 6])
def test_conform_and_equal_loops(k: int) -> None:
    check_loss(topk_rkl.SPEC, config={"k": k}, reference=reference(topk_rkl_loops))
    check_loss(topk_jsd.SPEC, config={"k": k, "beta": 0.3}, reference=reference(topk_jsd_loops))
    check_loss(topk_rkl_sampled.SPEC, config={"k": k}, reference=reference(sampled_loops))


@pytest.mark.parametrize(
    ("module", "dense"),
    [(topk_rkl, kl(LOG_Q, LOG_P)), (topk_jsd, jensen_shannon(LOG_P, LOG_Q, 0.5))],
    ids=["topk-rkl", "topk-jsd"],
)
def test_the_bias_is_downwards_and_ends_with_the_last_token(module, dense) -> None:
    """Merging tokens can only lower a divergence; with one token left to merge nothing is lost."""
    values = torch.stack([_value(module, STUDENT, k) for k in range(1, 9)])
    assert (values.diff(dim=0) >= -1e-12).all()
    assert (values[0] < dense - 1e-3).all()
    torch.testing.assert_close(values[-1], dense)


def test_the_missing_part_is_the_kl_within_the_rest() -> None:
    """As the card says: q(C̄) · KL(q within the rest ‖ p within the rest)."""
    ids = LOG_Q.topk(3).indices
    rest_q, rest_p = (log.scatter(-1, ids, -torch.inf) for log in (LOG_Q, LOG_P))
    within = kl(rest_q.log_softmax(-1), rest_p.log_softmax(-1)) * rest_q.exp().sum(-1)
    torch.testing.assert_close(_value(topk_rkl, STUDENT, 3) + within, kl(LOG_Q, LOG_P))


@pytest.mark.parametrize("k", [1, 4])
def test_sampled_value_and_gradient_are_those_of_the_dense_loss_on_average(k: int) -> None:
    """Averaged over every token that the student could draw, with its probability: no sampling, no tolerance for it."""
    leaf = STUDENT.clone().requires_grad_()
    chance = LOG_Q.exp()
    mean = sum((chance[:, y] * _value(topk_rkl_sampled, leaf, k, targets=torch.full((4,), y))).sum() for y in range(9))
    (gradient,) = torch.autograd.grad(mean, leaf)
    other = STUDENT.clone().requires_grad_()
    dense = kl(other.log_softmax(-1), LOG_P).sum()
    (expected,) = torch.autograd.grad(dense, other)
    torch.testing.assert_close(mean, dense)
    torch.testing.assert_close(gradient, expected)


def test_what_they_need_of_the_teacher() -> None:
    for module in (topk_rkl, topk_rkl_sampled, topk_jsd):
        assert module.SPEC.needs() is TeacherAccess.CHOSEN_IDS
        assert module.SPEC.chosen_k(module.SPEC.config(k=5)) == 5
