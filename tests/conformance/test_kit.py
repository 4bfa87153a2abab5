"""The kit's doors: results, expected failures, pytest cases, settings, and losses that fail in odd ways."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bad_losses import BAD
from good_losses import BOTH, DPO_SPEC, FORWARD_KL, REINFORCE, Settings, forward_kl_reference, loss_class, spec_of
from torch import Tensor

from dpkd.api import LossConfig, LossSpec, Signal, TokenLoss, setting
from dpkd.errors import DpkdError
from dpkd.functional import kl
from dpkd.testing import (
    CheckFailed,
    CheckWarned,
    NonConforming,
    Outcome,
    check_installed,
    check_loss,
    loss_checks,
    parametrize_checks,
)

MEAN = next(case.spec for case in BAD if case.name == "mean_inside")
DENOMINATOR = next(case.spec for case in BAD if case.name == "micro_batch_denominator")


@parametrize_checks(FORWARD_KL, reference=forward_kl_reference)
def test_conforms(check: Callable[[], None]) -> None:
    check()


@parametrize_checks(DENOMINATOR, expected_failures={"positions_are_independent": "its paper divides so"})
def test_conforms_but_for(check: Callable[[], None]) -> None:
    check()


def test_cases_have_readable_ids(request: pytest.FixtureRequest) -> None:
    names = {item.name for item in request.session.items}
    if len(names) > 1:
        assert "test_conforms[forward-kl-positions_are_independent]" in names


def _cases(*arguments: Any, **more: Any) -> dict[str, Any]:
    return {case.id: case for case in parametrize_checks(*arguments, **more).args[1]}


def test_pytest_cases_skip_what_warns_and_mark_what_is_accepted() -> None:
    cases = _cases(DENOMINATOR, expected_failures={"positions_are_independent": "its paper divides so"})
    (mark,) = cases["micro-batch-denominator-positions_are_independent"].marks
    assert mark.kwargs == {"strict": True, "reason": "its paper divides so"}
    with pytest.raises(pytest.skip.Exception, match="no reference"):
        cases["micro-batch-denominator-matches_reference"].values[0]()
    with pytest.raises(CheckFailed, match="differ when the batch is cut"):
        cases["micro-batch-denominator-positions_are_independent"].values[0]()


def test_checks_come_as_names_and_callables() -> None:
    checks = dict(loss_checks(FORWARD_KL))
    checks["zero_at_match"]()
    assert not {"stationary_at_match", "expected_gradient", "one_advantage_per_token"} & set(checks)
    with pytest.raises(CheckWarned):
        checks["matches_reference"]()
    assert "bfloat16_inputs" not in dict(loss_checks(DPO_SPEC))
    assert {"expected_gradient", "one_advantage_per_token"} <= set(dict(loss_checks(REINFORCE)))


def test_a_broken_foundation_is_said_once() -> None:
    report = check_installed(MEAN)
    assert not report.ok
    assert report.named(Outcome.FAILED) == ("one_value_per_position",)
    reasons = {r.check: r.reason for r in report.results}
    assert reasons["one_value_per_position"].startswith("6 rows gave a result of shape [], expected [6]")
    assert reasons["deterministic"] == "not judged while one_value_per_position fails"


def test_table_is_for_people() -> None:
    lines = check_installed(MEAN).table().splitlines()
    assert lines[0].startswith("mean-inside: ")
    assert "1 failed" in lines[0]
    assert any(line.split() == ["one_value_per_position", "FAILED"] for line in lines)
    assert any("6 rows gave a result of shape [], expected [6]" in line for line in lines)
    assert max(map(len, lines)) <= 110


def test_raises_with_the_report() -> None:
    with pytest.raises(AssertionError, match=r"positions_are_independent +FAILED") as caught:
        check_loss(DENOMINATOR)
    assert isinstance(caught.value, NonConforming)
    assert not caught.value.report.ok


def test_an_expected_failure_is_accepted_with_its_reason() -> None:
    report = check_loss(DENOMINATOR, expected_failures={"positions_are_independent": "its paper divides so"})
    assert report.ok
    assert report.named(Outcome.EXPECTED) == ("positions_are_independent",)
    assert "its paper divides so" in report.table()


def test_an_accepted_foundation_does_not_stop_the_others() -> None:
    """An accepted half-precision result is still checked for all else."""

    def forward(self: Any, x: Any) -> Tensor:
        return kl(x.teacher_log_probs(), x.student_log_probs()).double()

    spec = spec_of("double", loss_class(TokenLoss, forward), BOTH)
    assert len(check_installed(spec).named(Outcome.SKIPPED)) > 5
    accepted = {"one_value_per_position": "float64 wanted", "bfloat16_inputs": "float64 wanted"}
    # It has neither weights nor a KL sum: those two have nothing to check.
    skipped = check_loss(spec, expected_failures=accepted).named(Outcome.SKIPPED)
    assert skipped == ("kl_sum_says_the_same", "weights_train")


@pytest.mark.parametrize("name", ["deterministic", "weights_train", "matches_reference"])
def test_an_expected_failure_that_does_not_fail_is_an_error(name: str) -> None:
    with pytest.raises(NonConforming, match=r"expected to fail \(so I thought\), but (passed|skipped|warned)"):
        check_loss(FORWARD_KL, expected_failures={name: "so I thought"})


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"determinstic": "typo"}, "did you mean deterministic?"),
        ({"expected_gradient": "not for this loss"}, "no check that applies is called 'expected_gradient'"),
        ({"deterministic": " "}, "'deterministic' needs a reason"),
    ],
)
def test_expected_failures_that_make_no_sense(expected: dict[str, str], message: str) -> None:
    with pytest.raises(DpkdError, match=message):
        check_loss(FORWARD_KL, expected_failures=expected)
    with pytest.raises(DpkdError, match=message):
        parametrize_checks(FORWARD_KL, expected_failures=expected)


class Switch(LossConfig):
    """One switch."""

    wrong: bool = setting(False, description="be wrong", source="made up")


def _switched(self: Any, x: Any) -> Tensor:
    values_N = kl(x.teacher_log_probs(), x.student_log_probs())
    return values_N.mean() if self.config.wrong else values_N


SWITCHED = spec_of("switched", loss_class(TokenLoss, _switched), BOTH, config=Switch)


def test_a_loss_is_checked_under_the_settings_that_are_given() -> None:
    assert check_loss(SWITCHED).ok
    for config in ({"wrong": True}, Switch(wrong=True)):
        with pytest.raises(NonConforming):
            check_loss(SWITCHED, config=config)
    with pytest.raises(DpkdError, match=r"the loss 'switched' cannot be checked under .*wrng"):
        check_loss(SWITCHED, config={"wrng": True})


def test_a_loss_that_raises_is_told_with_its_line() -> None:
    def forward(self: Any, x: Any) -> Tensor:
        raise KeyError("gone")

    (reason,) = (r.reason for r in check_installed(_spec(forward)).results if r.outcome is Outcome.FAILED)
    assert reason.startswith("KeyError: 'gone' (")
    assert "test_kit.py, line" in reason


def _spec(forward: Callable[..., Any], reads: frozenset[Signal] = BOTH) -> LossSpec:
    return spec_of("small", loss_class(TokenLoss, forward), reads)


def test_a_loss_may_work_in_float32_and_is_still_compared_with_differences() -> None:
    def rounded(self: Any, x: Any) -> Tensor:
        return kl(x.teacher_log_probs(), x.student_log_probs()).float()

    def rounded_and_wrong(self: Any, x: Any) -> Tensor:
        values_N = kl(x.teacher_log_probs().float(), x.student_log_probs().float())
        return torch.where(values_N.isinf(), values_N, 0.9 * values_N + 0.1 * values_N.detach())

    assert check_installed(_spec(rounded)).ok
    assert check_installed(_spec(rounded_and_wrong)).named(Outcome.FAILED) == ("gradient_is_the_derivative",)


def test_a_reference_of_another_shape_is_said() -> None:
    with pytest.raises(NonConforming, match=r"the reference returned shape \[\], expected \[6\]"):
        check_loss(FORWARD_KL, reference=lambda **_: 0.0)


def test_a_reference_gets_what_the_loss_declares() -> None:
    seen: list[dict[str, Any]] = []

    def reference(**given: Any) -> Any:
        seen.append(given)
        return forward_kl_reference(**given)

    check_loss(FORWARD_KL, reference=reference)
    assert set(seen[0]) == {"student_logits", "teacher_logits", "config"}
    assert seen[0]["student_logits"].dtype == "float64"
    assert seen[0]["config"] == Settings()


def test_random_numbers_outside_the_kit_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    check_installed(REINFORCE)
    assert torch.equal(torch.rand(3), expected)


def test_the_kit_runs_without_pytest() -> None:
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "from dpkd.api import LossSpec\nfrom dpkd.testing import check_installed\n"
        "from dpkd.plugins import load_registry\n"
        "assert check_installed(load_registry().get(LossSpec, 'rkl').spec).ok"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
