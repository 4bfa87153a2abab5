"""The warning of a preference that pushes both responses away: when it comes, when not, and once."""

from __future__ import annotations

from dpkd.run_metrics import collapse_step
from dpkd.train.guard import RunawayGuard


def line(chosen, rejected, tokens=10.0):
    return {
        "logp/chosen": chosen * tokens,
        "length/chosen": tokens,
        "logp/rejected": rejected * 20.0,
        "length/rejected": 20.0,
    }


def said(*pairs):
    guard = RunawayGuard()
    return [guard.look(line(*pair)) is not None for pair in pairs]


def test_it_speaks_once_when_both_keep_falling():
    assert said((-2.0, -1.0), (-3.5, -4.0), (-4.0, -6.0), (-5.0, -9.0), (-6.0, -12.0)) == [0, 0, 0, 1, 0]


def test_it_is_silent_where_only_the_dispreferred_falls_or_all_is_noise():
    assert not any(said((-2.0, -1.0), (-2.1, -9.0), (-2.0, -20.0), (-2.2, -30.0), (-2.0, -40.0)))
    assert not any(said((-2.0, -1.0), (-3.5, -4.0), (-2.0, -3.0), (-3.5, -4.0), (-2.0, -3.0)))
    assert RunawayGuard().look({"loss/main": 1.0}) is None


def test_the_step_of_the_collapse_is_that_of_the_warning():
    pairs = [(-2.0, -1.0), (-3.5, -4.0), (-4.0, -6.0), (-5.0, -9.0), (-6.0, -12.0)]
    rows = [{"step": 10 * place, **line(*pair)} for place, pair in enumerate(pairs)]
    assert collapse_step(rows) == 30
    assert collapse_step(rows[:3]) is None
    assert collapse_step([{"step": 1, "loss/main": 1.0}]) is None
