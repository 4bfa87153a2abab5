"""`dpkd-greedy`: Eq. 8 of DPKD, the teacher greedy, the student not, no LM term."""

from __future__ import annotations

import torch

from dpkd import losses
from dpkd.config.layers import Layer
from dpkd.config.resolve import resolve
from dpkd.plugins import load_registry


def test_it_is_dpkd_with_sums() -> None:
    logps = torch.tensor([-3.0, -8.0], dtype=torch.float64)
    given = {
        "student_logps": (logps, logps - 2),
        "teacher_logps": (logps + 1, logps - 5),
        "lengths": (torch.tensor([3, 4]), torch.tensor([9, 2])),
    }
    # log q/p is -1 on the chosen and 3 on the rejected responses, β is 0.1: softplus(0.4).
    expected = torch.nn.functional.softplus(torch.tensor(0.4, dtype=torch.float64))
    torch.testing.assert_close(losses.get("dpkd-greedy")(**given), expected)
    assert (losses.get("dpkd")(**given) - expected).abs() > 0.1


def test_what_a_run_of_it_reads_by_default() -> None:
    named = {
        "loss": {"name": "dpkd-greedy"},
        "teacher": {"model": "T"},
        "student": {"model": "S"},
        "data": {"path": "D"},
    }
    settings = resolve([Layer("test", named)], load_registry()).settings
    assert settings.text.teacher_sampling.temperature == 0
    assert settings.text.sampling.temperature == 1
    assert (settings.text.chosen, settings.text.rejected) == ("teacher", "student")
    assert settings.terms.lm.weight == 0
