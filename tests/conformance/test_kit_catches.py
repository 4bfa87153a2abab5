"""The kit's own test: every check sees the bug that it is for, and good losses pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bad_rollouts  # noqa: F401
import bad_settings  # noqa: F401
import bad_specs  # noqa: F401
import pytest
from bad_losses import BAD, Bad
from good_losses import GOOD

from dpkd.api import LossSpec
from dpkd.testing import ALL_CHECKS, NonConforming, Outcome, check_loss


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case.check}-{case.name}")
def test_a_bug_is_caught_by_the_check_that_is_for_it(case: Bad) -> None:
    with pytest.raises(NonConforming) as caught:
        check_loss(case.spec, **case.told)
    assert caught.value.report.named(Outcome.FAILED) == (case.check,), str(caught.value)


@pytest.mark.parametrize(("spec", "reference"), GOOD, ids=lambda value: getattr(value, "name", ""))
def test_good_losses_pass(spec: LossSpec, reference: Callable[..., Any] | None) -> None:
    report = check_loss(spec, reference=reference)
    warned = () if reference else ("matches_reference",)
    assert report.named(Outcome.WARNED) == warned, report.table()
    assert len(report.named(Outcome.PASSED)) >= 13


def test_every_check_has_a_known_bug() -> None:
    names = [check.name for check in ALL_CHECKS]
    assert len(set(names)) == len(names) == 28
    assert {case.check for case in BAD} == set(names)


def test_every_check_passes_some_good_loss() -> None:
    """A check that always skips or warns would catch nothing of a stranger's."""
    passed = {name for spec, reference in GOOD for name in check_loss(spec, reference=reference).named(Outcome.PASSED)}
    assert {check.name for check in ALL_CHECKS} - passed == {"stationary_at_match"}  # dpkd-token passes it
