"""`dpkd-hinge`: a line up to the margin 1/β, nothing after it; with the teacher as reference, or none."""

from __future__ import annotations

from typing import Any

import oracles_pair
import pytest
import torch
from dpkd_zoo.dpkd_hinge import SPEC, DPKDHingeConfig, DPKDHingeLoss
from zoo_inputs import pair_inputs, random_pairs

from dpkd.api import Signal, TeacherAccess
from dpkd.testing import Outcome, check_loss

FREE = {"reference": "none"}


@pytest.mark.parametrize(
    "settings", [{}, {"aggregation": "mean", "beta": 1.0}, FREE, {**FREE, "aggregation": "mean"}], ids=str
)
def test_conforms_and_equals_loops(settings: dict[str, Any]) -> None:
    report = check_loss(SPEC, config=settings, reference=oracles_pair.hinge)
    assert report.named(Outcome.WARNED) == ()


@pytest.mark.parametrize(("ahead", "value"), [(-4.0, 3.0), (0.0, 1.0), (1.0, 0.5), (2.0, 0.0), (50.0, 0.0)])
def test_is_a_line_until_the_margin_is_reached(ahead: float, value: float) -> None:
    """β = 1/2: the margin aimed at is 2 nats."""
    x = pair_inputs(([-5.0 + ahead], [-7.0]), ([3.0], [4.0]), ([-5.0], [-7.0]))
    assert DPKDHingeLoss(DPKDHingeConfig(beta=0.5))(x).item() == pytest.approx(value)
    assert x.parts["margin"].item() == pytest.approx(ahead)


def test_lengths_divide_before_the_difference() -> None:
    """log q/p is -4 over 2 tokens and -9 over 3: 1 per token, 5 as a sum."""
    x = pair_inputs(([-6.0], [-10.0]), ([2.0], [3.0]), ([-2.0], [-1.0]))
    assert DPKDHingeLoss(DPKDHingeConfig(beta=0.1))(x).item() == pytest.approx(0.5)
    assert DPKDHingeLoss(DPKDHingeConfig(beta=0.1, aggregation="mean"))(x).item() == pytest.approx(0.9)


def test_without_reference_it_is_slic_up_to_a_factor() -> None:
    """β · max(0, 1/β - log q(y_t) + log q(y_s))."""
    (q_t, q_s), lengths, teacher = random_pairs(6, seed=1)
    values = DPKDHingeLoss(DPKDHingeConfig(beta=0.25, reference="none"))(pair_inputs((q_t, q_s), lengths))
    expected = [0.25 * max(0.0, 4 - t + s) for t, s in zip(q_t.tolist(), q_s.tolist(), strict=True)]
    assert values.tolist() == pytest.approx(expected)
    anchored = DPKDHingeLoss(DPKDHingeConfig(beta=0.25))(pair_inputs((q_t, q_s), lengths, teacher))
    assert not torch.allclose(anchored, values)


@pytest.mark.parametrize(("ahead", "slope"), [(1.9, 0.5), (2.0, 0.0), (2.1, 0.0)])
def test_gradient_closed_form(ahead: float, slope: float) -> None:
    """-β and β before the margin, nothing at it and after."""
    q_t = torch.tensor([ahead - 5], dtype=torch.float64, requires_grad=True)
    q_s = torch.tensor([-5.0], dtype=torch.float64, requires_grad=True)
    loss = DPKDHingeLoss(DPKDHingeConfig(beta=0.5))
    loss(pair_inputs((q_t, q_s), ([3.0], [4.0]), ([-5.0], [-5.0]))).sum().backward()
    assert q_t.grad is not None
    assert q_s.grad is not None
    assert (q_t.grad.item(), q_s.grad.item()) == (-slope, slope)


def test_reads_the_teacher_only_where_it_is_the_reference() -> None:
    assert SPEC.needs() is TeacherAccess.TOKEN_LOGPS
    free = DPKDHingeConfig(reference="none")
    assert SPEC.needs(free) is TeacherAccess.NONE
    assert SPEC.signals(free) == {Signal.STUDENT_LOGPS, Signal.LENGTHS}


@pytest.mark.parametrize("wrong", [{"beta": 0}, {"reference": "start"}, {"aggregation": "total"}], ids=str)
def test_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Input should be"):
        DPKDHingeConfig(**wrong)
