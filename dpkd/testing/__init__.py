"""The conformance kit for losses: `check_loss`, `loss_checks`, `parametrize_checks`, `check_installed`."""

from __future__ import annotations

from dpkd.testing.kit import ALL_CHECKS, check_installed, check_loss, loss_checks, parametrize_checks
from dpkd.testing.results import CheckFailed, CheckSkipped, CheckWarned, NonConforming, Outcome, Report, Result

__all__ = [
    "ALL_CHECKS",
    "CheckFailed",
    "CheckSkipped",
    "CheckWarned",
    "NonConforming",
    "Outcome",
    "Report",
    "Result",
    "check_installed",
    "check_loss",
    "loss_checks",
    "parametrize_checks",
]
