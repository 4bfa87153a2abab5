"""`speculative-kd`: three divergences by loops, and the text that it suggests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dpkd_zoo.fkl import FKLConfig, FKLLoss
from dpkd_zoo.speculative_kd import SPEC
from oracles_token import Row, divergence, mixture, reference, softmax
from pydantic import ValidationError
from token_helpers import gradient, value
from zoo_inputs import randn

from dpkd.config.extras import own_text
from dpkd.plugins import load_registry
from dpkd.testing import check_loss


def oracle(z_p: Row, z_q: Row, _: int, c: Any) -> float:
    p, q = softmax(z_p), softmax(z_q)
    m = mixture(p, q, 0.5)
    return {0.0: divergence(p, q), 1.0: divergence(q, p), 0.5: (divergence(p, m) + divergence(q, m)) / 2}[c.beta]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_conforms_and_equals_loops(beta: float) -> None:
    check_loss(SPEC, config={"beta": beta}, reference=reference(oracle))


@pytest.mark.parametrize(("name", "beta"), [("fkl", 0.0), ("jsd", 0.5), ("rkl", 1.0)])
def test_the_old_setting_is_translated_with_a_warning(name: str, beta: float) -> None:
    with pytest.warns(FutureWarning, match=f"loss.divergence={name} is now loss.beta={beta:g}"):
        assert SPEC.config(divergence=name).beta == beta
    with pytest.raises(ValidationError, match="divergence"):
        SPEC.config(divergence="kl")


def test_is_forward_kl_by_default() -> None:
    student, teacher = randn(3, 5, seed=1), randn(3, 5, seed=2)
    loss, same = SPEC.loss(SPEC.config()), FKLLoss(FKLConfig())
    torch.testing.assert_close(value(loss, student, teacher), value(same, student, teacher))
    torch.testing.assert_close(gradient(loss, student, teacher), gradient(same, student, teacher))


def test_the_student_proposes_and_the_teacher_has_a_veto() -> None:
    text = own_text(SPEC, {}, "text", load_registry())[1]
    assert (text.source, text.teacher_veto, text.teacher_mix, text.refresh) == ("student", 25, 0.0, "every_step")
