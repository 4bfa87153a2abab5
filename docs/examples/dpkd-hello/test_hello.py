"""The loss keeps its contract, and equals a NumPy function written from the formula."""

import numpy as np
from dpkd_hello import SPEC

from dpkd.testing import parametrize_checks


def softmax(logits_NV):
    weights_NV = np.exp(logits_NV - logits_NV.max(-1, keepdims=True))
    return weights_NV / weights_NV.sum(-1, keepdims=True)


def reference(*, student_logits, teacher_logits, config):
    """The formula once more, [N]: from the paper, not from the loss's code."""
    gaps_NV = np.abs(softmax(teacher_logits) - softmax(student_logits))
    return (gaps_NV**config.power).sum(-1) / 2


@parametrize_checks(SPEC, reference=reference)
def test_it_conforms(check):
    check()


@parametrize_checks(SPEC, config={"power": 2.0}, reference=reference)
def test_it_conforms_with_squared_gaps(check):
    check()
