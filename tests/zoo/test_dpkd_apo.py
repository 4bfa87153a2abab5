"""`dpkd-apo`: which way each likelihood is sent, in both forms."""

from __future__ import annotations

from typing import Any

import oracles_pair
import pytest
import torch
from dpkd_zoo.dpkd_apo import SPEC, DPKDAPOConfig, DPKDAPOLoss
from oracles_pair import sigma
from zoo_inputs import pair_inputs, random_pairs

from dpkd.testing import Outcome, check_loss


@pytest.mark.parametrize(
    "settings", [{}, {"form": "down"}, {"beta": 0.5, "aggregation": "mean"}, {"form": "down", "beta": 1.0}], ids=str
)
def test_conforms_and_equals_loops(settings: dict[str, Any]) -> None:
    report = check_loss(SPEC, config=settings, reference=oracles_pair.apo)
    assert report.named(Outcome.WARNED) == ()


def test_at_match_each_part_is_a_half() -> None:
    student, lengths, _ = random_pairs(3, seed=4)
    for form in ("zero", "down"):
        x = pair_inputs(student, lengths, student)
        assert DPKDAPOLoss(DPKDAPOConfig(form=form))(x).tolist() == [1.0] * 3
        assert all(part.tolist() == [0.5] * 3 for part in x.parts.values())


def _gradients(form: str, seed: int) -> tuple[list[float], list[float], list[tuple[float, float]]]:
    (q_t, q_s), lengths, (p_t, p_s) = random_pairs(6, seed)
    q_t.requires_grad_()
    q_s.requires_grad_()
    loss = DPKDAPOLoss(DPKDAPOConfig(beta=0.7, form=form))
    loss(pair_inputs((q_t, q_s), lengths, (p_t, p_s))).sum().backward()
    assert q_t.grad is not None
    assert q_s.grad is not None
    rewards = list(zip((0.7 * (q_t - p_t)).tolist(), (0.7 * (q_s - p_s)).tolist(), strict=True))
    return q_t.grad.tolist(), q_s.grad.tolist(), rewards


def _bump(z: float) -> float:
    return sigma(z) * sigma(-z)


def test_zero_raises_the_preferred_and_lowers_the_dispreferred() -> None:
    up, down, rewards = _gradients("zero", seed=1)
    assert up == pytest.approx([-0.7 * _bump(t) for t, _ in rewards])
    assert down == pytest.approx([0.7 * _bump(s) for _, s in rewards])
    assert max(up) < 0 < min(down)


def test_down_lowers_the_preferred_where_the_margin_is_large_and_the_dispreferred_always() -> None:
    chosen, rejected, rewards = _gradients("down", seed=2)
    assert chosen == pytest.approx([0.7 * (_bump(t) - _bump(t - s)) for t, s in rewards])
    assert rejected == pytest.approx([0.7 * _bump(t - s) for t, s in rewards])
    assert min(rejected) > 0
    assert min(chosen) > 0
    q_t = torch.tensor([-3.0], requires_grad=True)
    far = pair_inputs((q_t, torch.tensor([-90.0])), ([1.0], [1.0]), ([-3.0], [-3.0]))
    DPKDAPOLoss(DPKDAPOConfig(form="down", beta=1))(far).sum().backward()
    assert q_t.grad is not None
    assert q_t.grad.item() > 0  # descent makes the teacher's response less likely: what the card warns of
    assert "less likely" in SPEC.card.avoid_when


@pytest.mark.parametrize(
    ("form", "reward_t", "reward_s", "value"),
    [("zero", 800, -800, 0), ("zero", -800, 800, 2), ("down", -800, -1600, 0), ("down", 800, 1600, 2)],
)
def test_lies_between_0_and_2(form: str, reward_t: float, reward_s: float, value: float) -> None:
    x = pair_inputs(([reward_t - 1000.0], [reward_s - 2000.0]), ([5.0], [7.0]), ([-1000.0], [-2000.0]))
    assert DPKDAPOLoss(DPKDAPOConfig(form=form, beta=1))(x).item() == pytest.approx(value, abs=1e-12)


def test_small_values_keep_their_digits_in_float32() -> None:
    """σ(-20) = 2e-9 is lost in 1 - σ(20)."""
    x = pair_inputs(
        (torch.tensor([-10.0]), torch.tensor([-50.0])),
        (torch.ones(1), torch.ones(1)),
        (torch.tensor([-30.0]), torch.tensor([-20.0])),
    )
    assert DPKDAPOLoss(DPKDAPOConfig(beta=1))(x).item() == pytest.approx(sigma(-20) + sigma(-30), rel=1e-5)


@pytest.mark.parametrize("wrong", [{"beta": 0}, {"form": "up"}, {"aggregation": "total"}], ids=str)
def test_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Input should be"):
        DPKDAPOConfig(**wrong)
