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


def of_divergences(*values):
    return [{"step": 10 * i, **line(-2.0, -1.0), "kl/reverse": value} for i, value in enumerate(values)]


# As logged on an H200, every tenth step: pairs written once, without and with a likelihood term, and new pairs.
STALE = (1.374, 1.367, 1.307, 1.546, 2.205, 2.154, 2.483, 2.387, 3.054, 2.77, 2.457)
STALE_WITH_LM = (1.374, 1.369, 1.193, 1.284, 1.614, 1.33, 1.4, 1.418, 1.262, 1.448, 1.326)
FRESH = (1.337, 1.437, 1.17, 1.298, 1.577, 1.281, 1.345, 1.391, 1.24, 1.376, 1.276)


def test_it_speaks_when_the_student_leaves_its_teacher():
    # Means of three: the lowest is (1.374 + 1.367 + 1.307) / 3 = 1.349; at step 60 it is 2.281, above 1.5 times that.
    assert collapse_step(of_divergences(*STALE)) == 60
    guard = RunawayGuard()
    words = [word for row in of_divergences(*STALE) if (word := guard.look(row))]
    assert len(words) == 1
    assert "from 1.35 to 2.28 nats" in words[0]


# Of benchmarks/collapse.py on stories, every tenth step: `dpo` on pairs written once; `dpkd-ipo` on new ones, whose
# divergence rises at first, too, and comes back.
RISES_AT_ONCE = (1.637, 2.276, 3.046, 2.84, 2.761, 2.925, 2.979)
RISES_AND_FALLS = (1.637, 2.791, 2.777, 2.179, 1.92, 2.089, 2.363, 1.779, 1.322, 1.329, 1.283)


def test_it_speaks_when_the_student_left_its_teacher_at_once():
    # (1.637 + 2.276 + 3.046) / 3 = 2.32 is the lowest mean, and nothing later is 1.5 times that. The first value is:
    # (2.276 + 3.046 + 2.84) / 3 = 2.721, 1.084 above it, and then (3.046 + 2.84 + 2.761) / 3 = 2.882, 1.245 above it.
    assert collapse_step(of_divergences(*RISES_AT_ONCE)) == 40
    # (2.791 + 2.777 + 2.179) / 3 = 2.582 is more than 1.5 times the first value, and 0.945 above it.
    assert collapse_step(of_divergences(*RISES_AND_FALLS)) is None


def test_it_is_silent_where_the_divergence_is_noise_or_small():
    assert collapse_step(of_divergences(*STALE_WITH_LM)) is None
    assert collapse_step(of_divergences(*FRESH)) is None
    assert collapse_step(of_divergences(0.0, 0.0, 0.0, 0.1, 0.2, 0.3, 0.4)) is None  # it began as its teacher
    assert collapse_step([{"step": i, "kl/reverse": float(i)} for i in range(9)]) is None  # there are no pairs
