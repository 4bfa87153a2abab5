"""Every built-in loss, found as a stranger's would be, keeps the contract under its default settings."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from torch import Tensor

from dpkd.api import LossSpec
from dpkd.testing import Outcome, check_loss

POINTS = sorted(p for p in entry_points(group="dpkd") if p.value.startswith("dpkd_zoo."))
SPECS: dict[str, LossSpec] = {spec.name: spec for point in POINTS for spec in point.load().dpkd_losses()}


def test_the_built_in_losses_were_found() -> None:
    assert len(SPECS) >= 11


@pytest.mark.parametrize("name", SPECS)
def test_conforms(name: str) -> None:
    report = check_loss(SPECS[name])
    assert report.named(Outcome.EXPECTED) == ()
    assert len(report.named(Outcome.PASSED)) >= 13, report.table()


def _warned(name: str, **told: Any) -> tuple[str, ...]:
    return check_loss(SPECS[name], **told).named(Outcome.WARNED)


def test_minillm_descends_the_reverse_kl_of_whole_responses() -> None:
    """Eq. 3 without the length normalisation of Eq. 6."""
    assert _warned("minillm", config={"length_normalise": False}) == ("matches_reference",)


def test_minillms_default_is_said_to_descend_something_else() -> None:
    assert _warned("minillm") == ("expected_gradient", "matches_reference")


def test_an_objective_is_proved() -> None:
    """Rewards divided by 2, and no single-step part: half the gradient of the reverse KL of whole responses."""

    def half(student_logps: Sequence[Tensor], teacher_logps: Sequence[Tensor], config: object) -> Tensor:
        pairs = zip(student_logps, teacher_logps, strict=True)
        return torch.stack([q.sum().exp() * (q.sum() - p.sum()) / 2 for q, p in pairs]).sum()

    settings = {"reward_scale": 2.0, "length_normalise": False, "include_current": True, "single_step_weight": 0.0}
    assert _warned("minillm", config=settings, objective=half) == ("matches_reference",)
    with pytest.raises(AssertionError, match="expected gradient of the surrogate"):
        check_loss(SPECS["minillm"], config={**settings, "reward_scale": 1.0}, objective=half)
