"""The kernels of a CPU against float64 NumPy, against the unfused engine, and in blocks of every size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kl_sums import CASES, ROWS, SCALES, VOCABULARIES, WEIGHT, engine_gives_the_same, logits, oracle, slope

from dpkd.functional import KLSum
from dpkd.models import chunked, cpu_kernels, fused
from dpkd.models.head import Head, LogitRule


def kl_sum_(student, teacher, targets, terms):
    found = None if not terms.reads_teacher else teacher
    scales = {"student_scale": SCALES[0], "teacher_scale": SCALES[1]}
    return cpu_kernels.kl_sum_(student, found, targets, terms, WEIGHT, **scales)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradient_equal_float64(name, vocabulary):
    student, teacher, targets = logits(vocabulary)
    z, y, terms = student.double().numpy(), teacher.double().numpy(), CASES[name]
    values = kl_sum_(student, teacher, targets, terms)
    np.testing.assert_allclose(values, oracle(terms, z, y, targets.numpy()), rtol=2e-5, atol=1e-6)
    reverse_kl = terms.reverse and terms.reverse_share == 1.0
    for row in range(1 if reverse_kl else 0, ROWS):  # a reverse KL is infinite where the teacher excludes a token
        for column in {0, 3, 5, vocabulary // 2, vocabulary - 1, int(targets[row])}:
            expected = slope(terms, z, y, targets.numpy(), row, column)
            assert float(student[row, column]) == pytest.approx(expected, rel=2e-4, abs=2e-8), (row, column)


@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_that_of_the_logits_alone(name):
    student, teacher, targets = (x.bfloat16() if x.is_floating_point() else x for x in logits(VOCABULARIES[0]))
    z, y = student.double().numpy(), teacher.double().numpy()
    values = kl_sum_(student, teacher, targets, CASES[name])
    assert (values.dtype, student.dtype) == (torch.float32, torch.bfloat16)
    np.testing.assert_allclose(values, oracle(CASES[name], z, y, targets.numpy()), rtol=2e-5, atol=1e-6)


def test_infinite_where_the_formula_is():
    student, teacher, targets = logits(VOCABULARIES[0])
    assert torch.isinf(kl_sum_(student, teacher, targets, KLSum(reverse=1.0))[0, 1])


@pytest.mark.parametrize("name", CASES)
def test_probabilities_that_are_0_in_float32_count_for_nothing(name):
    """Logits so far apart that e to the difference is 0: in float64 their part of the value is below 1e-40."""
    student, teacher = torch.tensor([[0.0, -250.0, 1.0]]), torch.tensor([[0.0, -400.0, 2.0]])
    z, y, targets = student.double().numpy(), teacher.double().numpy(), torch.tensor([2])
    values = kl_sum_(student, teacher, targets, CASES[name])
    np.testing.assert_allclose(values, oracle(CASES[name], z, y, targets.numpy()), rtol=2e-5, atol=1e-6)
    assert bool(student.isfinite().all())


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_blocks_of_every_size_give_the_same(rows, monkeypatch):
    terms = CASES["jsd"]
    whole, teacher, targets = logits(37)
    expected = kl_sum_(whole, teacher, targets, terms)
    monkeypatch.setattr(chunked, "BLOCK_BYTES", rows * 4 * 37)
    parts, teacher, targets = logits(37)
    assert torch.equal(kl_sum_(parts, teacher, targets, terms), expected)
    assert torch.equal(parts, whole)


def test_the_teachers_logits_stay_as_they_are():
    student, teacher, targets = logits(37)
    before = teacher.clone()
    kl_sum_(student, teacher, targets, CASES["jsd"])
    assert torch.equal(teacher, before)


def test_no_row_is_no_value():
    empty = torch.empty(0, 37)
    assert kl_sum_(empty, empty, torch.empty(0, dtype=torch.long), CASES["kd"]).shape == (0, 3)


def test_the_engine_uses_them_and_gives_the_same(tmp_path):
    engine_gives_the_same(tmp_path, {"TRITON_INTERPRET": "0"})


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_who_asks_first_inside_autocast_is_told_the_same(precision):
    """A run in half precision asks in its first step: it is no reason to go without kernels."""
    fused.why_not.cache_clear()
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            assert fused.why_not("cpu") is None
            assert fused.usable(Head(torch.zeros(3, 2), None, LogitRule()))
    finally:
        fused.why_not.cache_clear()
