"""`gkd`: the divergence of `jsd`, on text by data set and student."""

from __future__ import annotations

import pytest
import torch
from dpkd_zoo.gkd import SPEC, GKDConfig, GKDLoss
from dpkd_zoo.jsd import JSDConfig, JSDLoss
from oracles_token import gkd, reference
from token_helpers import gradient, value
from zoo_inputs import randn

from dpkd.api import Text
from dpkd.config.extras import own_text
from dpkd.plugins import load_sources
from dpkd.testing import check_loss


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_conforms_and_equals_loops(beta: float) -> None:
    check_loss(SPEC, config={"beta": beta}, reference=reference(gkd))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_is_jsd(beta: float) -> None:
    student, teacher = randn(3, 5, seed=1), randn(3, 5, seed=2)
    gkd_loss, jsd_loss = GKDLoss(GKDConfig(beta=beta)), JSDLoss(JSDConfig(beta=beta))
    torch.testing.assert_close(value(gkd_loss, student, teacher), value(jsd_loss, student, teacher))
    torch.testing.assert_close(gradient(gkd_loss, student, teacher), gradient(jsd_loss, student, teacher))


def test_suggests_half_of_the_steps_on_the_students_text() -> None:
    text = own_text(SPEC, {}, "text", load_sources()[0])[1]
    assert text.source == "mixed"
    assert text.mix == {Text.DATASET: 0.5, Text.STUDENT: 0.5}
    assert text.refresh == "every_step"
