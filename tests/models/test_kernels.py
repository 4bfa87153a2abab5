"""The fused kernels on a CPU, through Triton's interpreter, against float64 NumPy and against the unfused engine."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from kl_sums import CASES, ROWS, VOCABULARIES, engine_gives_the_same, logits, oracle, slope

pytest.importorskip("triton", reason="Triton is a development dependency on Linux")

# Triton decides at its import whether it interprets: a process of its own.
WORKER = """
import sys, numpy as np, torch
from dpkd.models.kernels import kl_sum_
sys.path.insert(0, sys.argv[1])
from kl_sums import CASES, SCALES, VOCABULARIES, WEIGHT, logits
found = {}
for name, terms in CASES.items():
    for vocabulary in VOCABULARIES:
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher, targets = logits(vocabulary)
            student, teacher = student.to(dtype), teacher.to(dtype)
            no_teacher = not (terms.forward or terms.reverse)
            values = kl_sum_(student, None if no_teacher else teacher, targets, terms, WEIGHT,
                             student_scale=SCALES[0], teacher_scale=SCALES[1])
            key = f"{name}/{vocabulary}/{str(dtype).split('.')[1]}"
            found[key + "/values"], found[key + "/gradient"] = values.numpy(), student.float().numpy()
np.savez(sys.argv[2], **found)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("kernels") / "found.npz"
    around = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WORKER, os.path.dirname(__file__), str(path)], capture_output=True, text=True, env=around
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(path)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradient_equal_float64(found, name, vocabulary):
    student, teacher, targets = (x.numpy() for x in logits(vocabulary))
    z, y, terms = student.astype(np.float64), teacher.astype(np.float64), CASES[name]
    key = f"{name}/{vocabulary}/float32"
    np.testing.assert_allclose(found[key + "/values"], oracle(terms, z, y, targets), rtol=2e-5, atol=1e-6)
    reverse_kl = terms.reverse and terms.reverse_share == 1.0
    for row in range(1 if reverse_kl else 0, ROWS):  # a reverse KL is infinite where the teacher excludes a token
        for column in {0, 3, 5, vocabulary // 2, vocabulary - 1, int(targets[row])}:
            expected = slope(terms, z, y, targets, row, column)
            assert found[key + "/gradient"][row, column] == pytest.approx(expected, rel=2e-4, abs=2e-8), (row, column)


@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_that_of_the_logits_alone(found, name):
    vocabulary = VOCABULARIES[0]
    student, teacher, targets = logits(vocabulary)
    z, y = (x.bfloat16().double().numpy() for x in (student, teacher))
    key = f"{name}/{vocabulary}/bfloat16"
    np.testing.assert_allclose(found[key + "/values"], oracle(CASES[name], z, y, targets.numpy()), rtol=2e-5, atol=1e-6)


def test_infinite_where_the_formula_is(found):
    assert np.isinf(found["reverse/37/float32/values"][0, 1])
    assert np.isfinite(found["skew reverse/37/float32/values"]).all()


def test_the_engine_uses_them_and_gives_the_same(tmp_path):
    engine_gives_the_same(tmp_path, {"TRITON_INTERPRET": "1"})
