"""The conformance kit: the contract of a loss in executable form, for built-in losses and a stranger's alike.

    check_loss(SPEC, reference=my_numpy_function)          # raises with a table

    @parametrize_checks(SPEC, reference=my_numpy_function)
    def test_conforms(check):
        check()

Each check is a small function in one of the `*_checks` modules. A loss's family and traits choose which apply. A
failure may be expected, with a reason: then the check must fail.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dpkd.api import LossConfig, LossSpec
from dpkd.errors import DpkdError
from dpkd.models.compile import why_no_graph
from dpkd.testing import (
    config_checks,
    gradient_checks,
    reference_checks,
    rollout_checks,
    schedule_checks,
    trait_checks,
    value_checks,
)
from dpkd.testing.results import CheckSkipped, CheckWarned, NonConforming, Outcome, Report, Result
from dpkd.testing.subject import Check, LossUnderTest

ALL_CHECKS: tuple[Check, ...] = (
    *config_checks.CHECKS,
    *value_checks.CHECKS,
    *gradient_checks.CHECKS,
    *trait_checks.CHECKS,
    *rollout_checks.CHECKS,
    *schedule_checks.CHECKS,
    *reference_checks.CHECKS,
)

Expected = Mapping[str, str] | None
Settings = LossConfig | Mapping[str, Any] | None
TestT = TypeVar("TestT", bound=Callable[..., None])


def check_loss(
    spec: LossSpec,
    *,
    config: Settings = None,
    reference: Callable[..., Any] | None = None,
    expected_failures: Expected = None,
    objective: Callable[..., Any] | None = None,
) -> Report:
    """Run every check that applies to a loss.

    spec               the spec of the loss
    config             settings to check under; the defaults when None
    reference          the author's float64 function, see `dpkd.testing.reference_checks`
    expected_failures  check name -> reason; such a check must fail
    objective          what a score function descends, see `dpkd.testing.rollout_checks`

    Raises NonConforming (an AssertionError whose message is the table) when anything unexpected happens, DpkdError
    when the arguments make no sense.
    """
    report = _run(spec, config, reference, objective, expected_failures)
    if not report.ok:
        raise NonConforming(report)
    return report


def check_installed(spec: LossSpec) -> Report:
    """What `dpkd check-loss` shows of the loss of a `spec`: every check under the default settings.

    Failures are in the report and not raised.
    """
    return _run(spec, None, None, None, None)


def compiles(spec: LossSpec) -> str:
    """Whether a loss is one graph for torch.compile under the default settings, or why it is not."""
    subject = _subject(spec, None, None, None)
    reason = why_no_graph(subject.build(), subject.batch().inputs(subject.reads))
    return "one graph" if reason is None else f"not as one graph ({reason})"


def loss_checks(
    spec: LossSpec,
    *,
    config: Settings = None,
    reference: Callable[..., Any] | None = None,
    objective: Callable[..., Any] | None = None,
) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, callable) of every check that applies to the loss of a `spec`.

    `config`, `reference` and `objective` are those of `check_loss`. The callable returns where the loss passes and
    raises CheckFailed (or whatever the loss raised), CheckSkipped or CheckWarned otherwise.
    """
    suite = _Suite(_subject(spec, config, reference, objective))
    for check in suite.applicable:
        yield check.name, _bound(suite, check)


def parametrize_checks(
    spec: LossSpec,
    *,
    config: Settings = None,
    reference: Callable[..., Any] | None = None,
    expected_failures: Expected = None,
    objective: Callable[..., Any] | None = None,
) -> Callable[[TestT], TestT]:
    """A pytest decorator: one case per check for a test with the argument `check`, which calls it.

    `spec`, `config`, `reference`, `expected_failures` and `objective` are those of `check_loss`. A check that
    warns or cannot judge is skipped with its reason; an expected failure is a strict xfail.
    """
    import pytest

    suite = _Suite(_subject(spec, config, reference, objective), _checked(spec, expected_failures))
    cases = []
    for check in suite.applicable:
        reason = suite.expected.get(check.name)
        marks = [] if reason is None else [pytest.mark.xfail(strict=True, reason=reason)]
        cases.append(pytest.param(_for_pytest(suite, check), id=f"{spec.name}-{check.name}", marks=marks))
    return pytest.mark.parametrize("check", cases)


@dataclass
class _Suite:
    """The checks of one loss; remembers how each ended, because others depend on it."""

    subject: LossUnderTest
    expected: Mapping[str, str] = field(default_factory=dict)
    _errors: dict[str, Exception | None] = field(default_factory=dict)

    @property
    def applicable(self) -> list[Check]:
        return [check for check in ALL_CHECKS if check.applies(self.subject.spec)]

    def run(self, check: Check) -> None:
        """Raises what the check raises, or CheckSkipped where an unexpected failure makes it meaningless."""
        for needed in self.applicable:
            if needed.name in check.requires and needed.name not in self.expected and self._failed(needed):
                raise CheckSkipped(f"not judged while {needed.name} fails")
        error = self._error(check)
        if error is not None:
            raise error

    def _failed(self, check: Check) -> bool:
        return not isinstance(self._error(check), CheckSkipped | CheckWarned | None)

    def _error(self, check: Check) -> Exception | None:
        if check.name not in self._errors:
            try:
                check.run(self.subject)
            except Exception as error:  # a loss may fail in any way
                self._errors[check.name] = error
            else:
                self._errors[check.name] = None
        return self._errors[check.name]


def _run(
    spec: LossSpec,
    config: Settings,
    reference: Callable[..., Any] | None,
    objective: Callable[..., Any] | None,
    expected_failures: Expected,
) -> Report:
    suite = _Suite(_subject(spec, config, reference, objective), _checked(spec, expected_failures))
    return Report(spec.name, tuple(_result(suite, check) for check in suite.applicable))


def _result(suite: _Suite, check: Check) -> Result:
    outcome, reason = Outcome.PASSED, ""
    try:
        suite.run(check)
    except CheckSkipped as skipped:
        outcome, reason = Outcome.SKIPPED, str(skipped)
    except CheckWarned as warned:
        outcome, reason = Outcome.WARNED, str(warned)
    except Exception as error:
        outcome, reason = Outcome.FAILED, _sentence(error)
    accepted = suite.expected.get(check.name)
    if accepted is None:
        return Result(check.name, outcome, reason)
    if outcome is Outcome.FAILED:
        return Result(check.name, Outcome.EXPECTED, accepted)
    return Result(
        check.name, Outcome.FAILED, f"expected to fail ({accepted}), but {outcome.value}: take it off expected_failures"
    )


def _sentence(error: Exception) -> str:
    if isinstance(error, AssertionError):
        return str(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"


def _bound(suite: _Suite, check: Check) -> Callable[[], None]:
    return lambda: suite.run(check)


def _for_pytest(suite: _Suite, check: Check) -> Callable[[], None]:
    def run() -> None:
        import pytest

        try:
            suite.run(check)
        except (CheckSkipped, CheckWarned) as reason:
            pytest.skip(str(reason))

    return run


def _subject(
    spec: LossSpec, config: Settings, reference: Callable[..., Any] | None, objective: Callable[..., Any] | None
) -> LossUnderTest:
    if isinstance(config, LossConfig):
        return LossUnderTest(spec, config, reference, objective)
    try:
        return LossUnderTest(spec, spec.config(**(config or {})), reference, objective)
    except ValueError as error:
        raise DpkdError(
            f"the loss {spec.name!r} cannot be checked under the settings {config or {}}: {error}"
        ) from error


def _checked(spec: LossSpec, expected: Expected) -> Mapping[str, str]:
    """The expected failures. Raises DpkdError for an unknown check, or one without a reason."""
    names = [check.name for check in ALL_CHECKS if check.applies(spec)]
    for name, reason in (expected or {}).items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(names)}"
            raise DpkdError(f"expected_failures of {spec.name!r}: no check that applies is called {name!r}; {hint}")
        if not reason.strip():
            raise DpkdError(f"expected_failures of {spec.name!r}: {name!r} needs a reason")
    return expected or {}
