"""When a number stops being finite: who was the first to be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpkd import functional
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
    if micro_batch.teacher_logps is not None and _bad(micro_batch.teacher_logps):
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


class FiniteWatch:
    """Sees to it that a step whose numbers are not finite changes no weight, and waits for no device to tell.

    Where looking costs nothing it raises at once. Elsewhere a flag on the device is set, and stays set: fused
    optimizers skip the update where it is, others are asked before each. What is said of a step is read later,
    in `steps_at_fault`.
    """

    def __init__(self, optimizer: Any, device: torch.device) -> None:
        self.at_once = functional.free_to_read(device)
        # A flag that is no DTensor does not go together with weights that are.
        sharded = any(hasattr(p, "full_tensor") for group in optimizer.param_groups for p in group["params"])
        self.skips = bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and not sharded
        self._optimizer, self._bad = optimizer, torch.zeros((), device=device)
        self._steps: list[tuple[Any, Tensor]] = []

    def see(self, value: Tensor) -> bool:
        """Take note of a number; whether it is known to be bad."""
        if self.at_once:
            return not bool(torch.isfinite(value))
        self._bad = torch.maximum(self._bad, 1 - torch.isfinite(value).to(self._bad))
        return False

    def end_of_step(self, step: Any, agree: Callable[[Tensor], Tensor]) -> bool:
        """Before the update of a step: whether it must be asked for now. `agree` adds up over the processes."""
        if self.at_once:
            return False
        self._bad = agree(self._bad).clamp(max=1.0)
        self._steps.append((step, self._bad))
        if self.skips:
            self._optimizer.found_inf = self._bad
        return not self.skips

    def first_bad_step(self) -> Any | None:
        """The first step since the last call whose numbers were not finite: here the host waits."""
        steps, self._steps = self._steps, []
        flags = torch.stack([flag for _, flag in steps]).tolist() if steps else []
        return next((step for (step, _), flag in zip(steps, flags, strict=True) if flag), None)


ADVICE = "Try a lower train.lr, a clipped gradient (train.clip=1, or less), or train.precision=fp32."
