"""Comparison with the author's own function, written from the paper in NumPy.

It is called with float64 arrays as keyword arguments and returns one value per row `[N]`:

    token and rollout losses   reference(student_logits=..., teacher_logits=..., targets=..., config=...)
    on hidden states           reference(student_hidden=..., teacher_hidden=..., weights={name: ...}, config=...)
    pair losses                reference(student=(t, s), teacher=(t, s), reference=(t, s), lengths=(t, s), config=...)
    on their tokens            reference(student_token_logps=(t, s), teacher_token_logps=(t, s), ..., config=...)

It gets what the loss declares and nothing else; rows for which it returns NaN are not compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpkd.api import HIDDEN, Family, Loss, Pair, Signal
from dpkd.testing.inputs import EXCLUDED, SampleBatch
from dpkd.testing.results import CheckWarned
from dpkd.testing.subject import FOUNDATION, Check, LossUnderTest, require, require_close

PAIR_NAMES = {
    Signal.STUDENT_LOGPS: "student",
    Signal.TEACHER_LOGPS: "teacher",
    Signal.REFERENCE_LOGPS: "reference",
    Signal.LENGTHS: "lengths",
}


def matches_reference(subject: LossUnderTest) -> None:
    """Equal to the author's independent float64 function, on ordinary rows and with excluded tokens."""
    if subject.reference is None:
        raise CheckWarned(
            "no reference: no other check catches a divergence the wrong way round or a wrong constant. In a test of "
            "your own, pass reference=, a NumPy function written from the paper"
        )
    cases: list[dict[str, Any]] = [{"scale": scale} for scale in (0.1, 1.0, 4.0)]
    if subject.spec.family is not Family.PAIR and not HIDDEN & subject.reads:
        one, other = {"student_excludes": EXCLUDED}, {"teacher_excludes": EXCLUDED}
        cases += [one, other, {**one, **other}]
    for seed, how in enumerate(cases):
        batch = subject.batch(seed=seed, dtype=torch.float64, **how)
        loss = subject.build(torch.float64)
        expected_N = _reference_values(subject, batch, loss)
        found_N = subject.values(batch, loss).detach()
        close = 1e-4 if found_N.dtype is torch.float32 else 1e-7
        known_N = ~expected_N.isnan()
        what = ", ".join(f"{name} {value}" for name, value in how.items())
        require_close(
            found_N[known_N], expected_N[known_N], f"differs from the reference ({what})", atol=close, rtol=close
        )


def _reference_values(subject: LossUnderTest, batch: SampleBatch, loss: Loss) -> Tensor:
    import numpy as np

    assert subject.reference is not None
    arguments: dict[str, Any] = {"config": subject.config}
    if HIDDEN & subject.reads:
        arguments["weights"] = {name: weight.detach().numpy().copy() for name, weight in loss.named_parameters()}
    for signal in subject.reads & batch.signals.keys():  # rewards are read by the advantages
        value = batch.signals[signal]
        if isinstance(value, Pair):
            arguments[PAIR_NAMES.get(signal, signal.value)] = tuple(v.numpy().copy() for v in value)
        else:
            arguments[signal.value] = value.numpy().copy()
    with np.errstate(all="ignore"):
        values = np.asarray(subject.reference(**arguments), dtype=np.float64)
    require(
        values.shape == (len(batch),),
        f"the reference returned shape {list(values.shape)}, expected [{len(batch)}]: one value for each row",
    )
    return torch.from_numpy(values)


CHECKS = (Check(matches_reference, requires=FOUNDATION),)
