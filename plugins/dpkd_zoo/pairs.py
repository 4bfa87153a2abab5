"""What the pair losses share: log-ratios to a reference, the setting that averages them, and the text they suggest."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from dpkd.api import Pair, PairInputs, Signal, setting
from dpkd.functional import aggregate

Aggregation = Literal["sum", "mean"]

STUDENT = frozenset({Signal.STUDENT_LOGPS, Signal.LENGTHS})
STUDENT_AND_TEACHER = STUDENT | {Signal.TEACHER_LOGPS}

# Algorithm 1 of DPKD: both models answer each prompt, the student again at every step.
TEACHER_OVER_STUDENT: dict[str, Any] = {
    "text": {"source": "pairs", "chosen": "teacher", "rejected": "student", "refresh": "every_step"}
}
# For losses that do nothing to keep the likelihood of good text up.
WITH_LM_TERM: dict[str, Any] = {**TEACHER_OVER_STUDENT, "terms": {"lm": {"weight": 1.0}}}


def aggregation(default: Aggregation, source: str, what: str = "log-ratios") -> Any:
    """The setting `aggregation`: `what` of whole responses, or per token."""
    return setting(default, description=f"{what} of whole responses (sum) or per token (mean)", source=source)


def log_ratios(x: PairInputs, reference: Pair | None, how: Aggregation) -> Pair:
    """`log q(y)/r(y)` of both responses `[B]` under a reference r, `log q(y)` without one; `mean`: per token."""
    chosen, rejected = x.student
    if reference is not None:
        chosen, rejected = chosen - reference.chosen, rejected - reference.rejected
    return Pair(aggregate(chosen, x.lengths.chosen, how), aggregate(rejected, x.lengths.rejected, how))


def margin(x: PairInputs, reference: Pair | None, how: Aggregation) -> Tensor:
    """The log-ratio of the chosen response minus that of the rejected one, `[B]`."""
    chosen, rejected = log_ratios(x, reference, how)
    return chosen - rejected
