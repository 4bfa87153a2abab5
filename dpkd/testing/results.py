"""What a check says: results with a type, a report of all of them, and the exceptions that checks raise."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class CheckFailed(AssertionError):
    """A loss breaks the contract: what was found, what was expected, what to do."""


class CheckSkipped(Exception):
    """A check that cannot judge this loss, and why."""


class CheckWarned(Exception):
    """Nothing is wrong, but something is left unproved."""


class Outcome(StrEnum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    WARNED = "warned"
    EXPECTED = "expected failure"


@dataclass(frozen=True)
class Result:
    """One check of one loss: the name of the `check`, its `outcome`, and a `reason`, which is empty where it passed."""

    check: str
    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """The `results` of all checks of one `loss`, in the order in which they ran."""

    loss: str
    results: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed that was not expected to."""
        return not self.named(Outcome.FAILED)

    def named(self, outcome: Outcome) -> tuple[str, ...]:
        """The names of the checks with this `outcome`."""
        return tuple(r.check for r in self.results if r.outcome == outcome)

    def table(self) -> str:
        """Plain text, for people: one line per check, and the reason under each that did not simply pass."""
        counts = [(outcome, len(self.named(outcome))) for outcome in Outcome]
        title = ", ".join(f"{count} {outcome.value}" for outcome, count in counts if count)
        return "\n".join([f"{self.loss}: {title or 'no check ran'}", *self._lines()])

    def _lines(self) -> Iterator[str]:
        width = max((len(r.check) for r in self.results), default=0)
        for r in self.results:
            word = r.outcome.value.upper() if r.outcome is Outcome.FAILED else r.outcome.value
            yield f"  {r.check:<{width}}  {word}"
            yield from textwrap.wrap(r.reason, 80, initial_indent=" " * 6, subsequent_indent=" " * 6)


class NonConforming(AssertionError):
    """A loss that breaks the contract; `report` has every result, the message is its table."""

    def __init__(self, report: Report) -> None:
        self.report = report
        super().__init__(report.table())
