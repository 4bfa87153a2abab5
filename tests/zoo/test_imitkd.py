"""`imitkd`: the teacher's choice as a label, or its distribution."""

from __future__ import annotations

import math

import pytest
import torch
from dpkd_zoo.imitkd import SPEC, ImitKDConfig, ImitKDLoss
from oracles_token import imitkd, reference
from token_helpers import gradient, logs, out, value
from zoo_inputs import randn

from dpkd.api import Text
from dpkd.config.extras import own_text
from dpkd.plugins import load_registry
from dpkd.testing import check_loss

CHOICE, DISTRIBUTION = ImitKDLoss(ImitKDConfig()), ImitKDLoss(ImitKDConfig(target="distribution"))
STUDENT, TEACHER = randn(4, 6, seed=1), randn(4, 6, seed=2)


@pytest.mark.parametrize("target", ["choice", "distribution"])
def test_conforms_and_equals_loops(target: str) -> None:
    check_loss(SPEC, config={"target": target}, reference=reference(imitkd))


def test_the_label_is_the_teachers_and_not_the_texts() -> None:
    """The loss is given no targets at all; the teacher's likeliest token is 1."""
    assert value(CHOICE, logs([0.5, 0.2, 0.3]), logs([0.3, 0.6, 0.1])).item() == pytest.approx(-math.log(0.2))


def test_gradients() -> None:
    p, q = TEACHER.softmax(-1), STUDENT.softmax(-1)
    label = torch.nn.functional.one_hot(TEACHER.argmax(-1), 6)
    torch.testing.assert_close(gradient(CHOICE, STUDENT, TEACHER), q - label)
    torch.testing.assert_close(gradient(DISTRIBUTION, STUDENT, TEACHER), q - p)


def test_excluded_tokens() -> None:
    """Infinite only where the student excludes the teacher's choice."""
    q, p = logs([0.5, 0.0, 0.5]), logs([0.3, 0.6, 0.1])
    assert value(CHOICE, q, p).item() == math.inf
    assert value(CHOICE, q, out(p, 1)).item() == pytest.approx(math.log(2))


def test_suggests_text_by_data_set_and_student() -> None:
    text = own_text(SPEC, {}, "text", load_registry())[1]
    assert text.mix == {Text.DATASET: 0.5, Text.STUDENT: 0.5}
