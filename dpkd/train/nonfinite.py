"""When a number stops being finite: who was the first to be wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from dpkd.errors import DpkdError
from dpkd.models.head import head_of, hidden_rows
from dpkd.train.loss_module import LossModule
from dpkd.train.microbatch import MicroBatch


class NotFinite(DpkdError):
    """A loss, logits or a gradient became NaN or infinite."""


def _bad(tensor: Tensor) -> bool:
    return not bool(torch.isfinite(tensor).all())


@torch.no_grad()
def explain(loss_module: LossModule, micro_batch: MicroBatch) -> NotFinite:
    """Look for the culprit of a loss that is not finite, in the order of the data flow."""
    for name, parameter in loss_module.named_parameters():
        if _bad(parameter):
            return NotFinite(f"the weight {name} is not finite. {ADVICE}")
    hidden = hidden_rows(loss_module.student, micro_batch.batch)
    if _bad(hidden):
        return NotFinite(f"the student's hidden states are not finite in the batch `{micro_batch.name}`. {ADVICE}")
    if _bad(head_of(loss_module.student, loss_module.vocabulary).logits(hidden[:64])):
        return NotFinite(f"the student's logits are not finite in the batch `{micro_batch.name}`. {ADVICE}")
    if micro_batch.teacher is not None and not micro_batch.teacher.is_finite():
        return NotFinite(
            "the teacher's logits are not finite. Try another teacher.dtype (float32) or teacher.attention."
        )
    if micro_batch.teacher_logps is not None and any(_bad(part) for part in micro_batch.teacher_logps):
        return NotFinite("the teacher's log-probs are not finite. Try another teacher.dtype (float32).")
    names = ", ".join(
        f"loss `{term.name}` ({type(loss_module.losses[term.name]).__name__})" for term in micro_batch.terms
    )
    return NotFinite(f"models are finite, but the value is not: {names}. Look at the loss's settings and the data.")


def explain_gradient(loss_module: LossModule) -> NotFinite:
    """Name the first parameter whose gradient is not finite."""
    for name, parameter in loss_module.named_parameters():
        if parameter.grad is not None and _bad(parameter.grad):
            return NotFinite(f"the gradient of {name} is not finite, though the loss is. {ADVICE}")
    return NotFinite(f"the norm of the gradient is not finite. {ADVICE}")


ADVICE = "Try a lower train.lr, a clipped gradient (train.clip=1, or less), or train.precision=fp32."
