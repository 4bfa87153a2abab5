"""`topk-kl`: the bucket, the whole vocabulary, and what renormalising and leaving out do."""

from __future__ import annotations

import math

import pytest
import torch
from dpkd_zoo.topk_kl import SPEC, TopKKLConfig, TopKKLLoss
from oracles_token import reference, topk_kl
from token_helpers import gradient, logs, out, value
from zoo_inputs import randn

from dpkd.functional import kl
from dpkd.testing import check_loss

STUDENT, TEACHER = randn(4, 9, seed=1), randn(4, 9, seed=2)


def _loss(k: int, tail: str = "bucket") -> TopKKLLoss:
    return TopKKLLoss(TopKKLConfig(k=k, tail=tail))


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("k", [2, 4, 5, 6, 7, 64])
def test_conforms_and_equals_loops(k: int, tail: str) -> None:
    check_loss(SPEC, config={"k": k, "tail": tail}, reference=reference(topk_kl))


def test_one_token_and_its_bucket() -> None:
    """p = ½ ¼ ¼, q = ¼ ¾ 0: KL of (½, ½) to (¼, ¾)."""
    found = value(_loss(1), logs([0.25, 0.75, 0.0]), logs([0.5, 0.25, 0.25])).item()
    assert found == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("k", [9, 10, 1000])
def test_with_all_tokens_it_is_the_kl(k: int, tail: str) -> None:
    expected = kl(TEACHER.log_softmax(-1), STUDENT.log_softmax(-1))
    torch.testing.assert_close(value(_loss(k, tail), STUDENT, TEACHER), expected)


def test_grows_with_k_up_to_the_kl() -> None:
    """Merging tokens loses information (the log sum inequality)."""
    values = torch.stack([value(_loss(k), STUDENT, TEACHER) for k in range(1, 10)])
    assert (values.diff(dim=0) >= -1e-12).all()
    assert (values[0] < values[-1] - 1e-3).all()


def test_gradient_with_the_bucket() -> None:
    """q - p on the k tokens; outside q · (1 - p(rest)/q(rest)). Without a bucket it would not sum to 0."""
    p, q = TEACHER.softmax(-1), STUDENT.softmax(-1)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, p.topk(3).indices, True)
    rest_p, rest_q = (x.masked_fill(kept, 0).sum(-1, keepdim=True) for x in (p, q))
    expected = torch.where(kept, q - p, q * (1 - rest_p / rest_q))
    torch.testing.assert_close(gradient(_loss(3), STUDENT, TEACHER), expected)
    assert expected.sum(-1).abs().max() < 1e-12


def test_renormalised_nothing_is_said_of_the_mass_outside() -> None:
    found = gradient(_loss(3, "renormalise"), STUDENT, TEACHER)
    kept = torch.zeros_like(found, dtype=torch.bool).scatter(-1, TEACHER.topk(3).indices, True)
    assert found.masked_fill(kept, 0).abs().max() < 1e-12


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_a_teacher_with_fewer_tokens_than_k(tail: str) -> None:
    """The k tokens reach into those that both exclude; the bucket is empty under both."""
    student, teacher = out(STUDENT, 0, 3, 4, 8), out(TEACHER, 0, 3, 4, 8)
    for k in (5, 7):
        torch.testing.assert_close(
            value(_loss(k, tail), student, teacher), kl(teacher.log_softmax(-1), student.log_softmax(-1))
        )
        assert gradient(_loss(k, tail), student, teacher).isfinite().all()


def test_a_full_teacher_leaves_a_bucket_that_is_no_rounding() -> None:
    """The k tokens hold all but 1e-12: 1 - Σ p would be 0 in float32, and the KL infinite or negative."""
    teacher, student = torch.tensor([[0.0, -28.0, -28.0]]), torch.tensor([[0.0, -30.0, -26.0]])
    assert value(_loss(1), student, teacher).item() == pytest.approx(0.0, abs=1e-9)
    assert gradient(_loss(1), student, teacher).isfinite().all()
