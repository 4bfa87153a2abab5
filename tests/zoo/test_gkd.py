"""`gkd`: the divergence of `jsd`, on text by data set and student."""

from __future__ import annotations

import pytest
from dpkd_zoo.gkd import SPEC
from oracles_token import gkd, reference

from dpkd.api import Text
from dpkd.config.extras import own_text
from dpkd.plugins import load_registry
from dpkd.testing import check_loss


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_conforms_and_equals_loops(beta: float) -> None:
    check_loss(SPEC, config={"beta": beta}, reference=reference(gkd))


def test_is_a_preset_of_jsd() -> None:
    assert SPEC.preset_of == "jsd"
    assert SPEC.config().beta == 0.5


def test_suggests_half_of_the_steps_on_the_students_text() -> None:
    text = own_text(SPEC, {}, "text", load_registry())[1]
    assert text.source == "mixed"
    assert text.mix == {Text.DATASET: 0.5, Text.STUDENT: 0.5}
    assert text.refresh == "every_step"
