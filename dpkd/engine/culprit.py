"""When a number stops being finite: who was the first to be wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from dpkd.engine.distiller import Distiller
from dpkd.engine.work import Work
from dpkd.errors import DpkdError
from dpkd.models.head import head_of, hidden_rows
from dpkd.teachers.aligned import AlignedRows
from dpkd.teachers.live import TeacherRows

__all__ = ["NotFinite", "explain", "explain_gradient"]


class NotFinite(DpkdError):
    """A loss, logits or a gradient became NaN or infinite."""


def _bad(tensor: Tensor) -> bool:
    return not bool(torch.isfinite(tensor).all())


@torch.no_grad()
def explain(distiller: Distiller, work: Work) -> NotFinite:
    """Look for the culprit of a loss that is not finite, in the order of the data flow."""
    for name, parameter in distiller.named_parameters():
        if _bad(parameter):
            return NotFinite(f"the weight {name} is not finite. {_ADVICE}")
    hidden = hidden_rows(distiller.student, work.batch)
    if _bad(hidden):
        return NotFinite(f"the student's hidden states are not finite in the stream `{work.stream}`. {_ADVICE}")
    if _bad(head_of(distiller.student, distiller.vocabulary).logits(hidden[:64])):
        return NotFinite(f"the student's logits are not finite in the stream `{work.stream}`. {_ADVICE}")
    # Over a union of vocabularies logits of -inf are no fault.
    bad_teacher = isinstance(work.teacher, TeacherRows | AlignedRows) and _bad(work.teacher.hidden)
    if bad_teacher or (isinstance(work.teacher, TeacherRows) and _bad(work.teacher.logits(slice(0, 64)))):
        return NotFinite(
            "the teacher's logits are not finite. Try another teacher.dtype (float32) or teacher.attention."
        )
    if work.teacher_logps is not None and any(_bad(part) for part in work.teacher_logps):
        return NotFinite("the teacher's log-probs are not finite. Try another teacher.dtype (float32).")
    names = ", ".join(f"loss `{term.name}` ({type(distiller.losses[term.name]).__name__})" for term in work.terms)
    return NotFinite(f"models are finite, but the value is not: {names}. Look at the loss's settings and the data.")


def explain_gradient(distiller: Distiller) -> NotFinite:
    """Name the first parameter whose gradient is not finite."""
    for name, parameter in distiller.named_parameters():
        if parameter.grad is not None and _bad(parameter.grad):
            return NotFinite(f"the gradient of {name} is not finite, though the loss is. {_ADVICE}")
    return NotFinite(f"the norm of the gradient is not finite. {_ADVICE}")


_ADVICE = "Try a lower train.lr, a clipped gradient (train.clip=1, or less), or train.precision=fp32."
