"""The loss under test, and the few things that all checks do with it. N rows, K columns of the student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpkd.api import HIDDEN, Family, Loss, LossConfig, LossSpec, Signal, Stack, TokenLoss, Trait
from dpkd.api.inputs import TOKEN_LOGPS
from dpkd.testing.inputs import STUDENT_STACK, TEACHER_STACK, InputShape, SampleBatch, random_batch
from dpkd.testing.results import CheckFailed

# Nothing is to be learnt from the value of a loss that fails one of these.
FOUNDATION = ("only_declared_signals", "one_value_per_position", "deterministic")
WITH_GRADIENT = (*FOUNDATION, "gradient_reaches_the_student_only")


@dataclass(frozen=True)
class LossUnderTest:
    """A loss, the settings that it is checked under, and what its author knows of it."""

    spec: LossSpec
    config: LossConfig
    reference: Callable[..., Any] | None = None
    objective: Callable[..., Tensor] | None = None

    @property
    def reads(self) -> frozenset[Signal]:
        """What the loss declares under these settings."""
        return self.spec.signals(self.config)

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Loss:
        """A new instance; the seed decides the first value of its weights, if it has any."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._bound()[0].to(dtype)

    def _bound(self) -> tuple[Loss, InputShape | None]:
        """A new instance, told of the models where it reads hidden states. Raises what its `bind` raises."""
        try:
            return self._bound_to(TEACHER_STACK)
        except ValueError:  # it takes models of one width only
            return self._bound_to(Stack(TEACHER_STACK.layers, STUDENT_STACK.width))

    def _bound_to(self, teacher: Stack) -> tuple[Loss, InputShape | None]:
        loss = self.spec.loss(self.config)
        if not (HIDDEN & self.reads and isinstance(loss, TokenLoss)):
            return loss, None
        return loss, InputShape(loss.bind(STUDENT_STACK, teacher), STUDENT_STACK.width, teacher.width)

    def batch(self, rows: int = 6, **how: Any) -> SampleBatch:
        """Random rows of the loss's family; see `random_batch`."""
        with torch.random.fork_rng(devices=[]):
            tokens = bool(self.reads & set(TOKEN_LOGPS.values()))
            return random_batch(self.spec.family, rows, hidden=self._bound()[1], tokens=tokens, **how)

    def values(self, batch: SampleBatch, loss: Loss | None = None) -> Tensor:
        """What the loss returns, `[N]`. Raises CheckFailed where it returns something else."""
        loss = self.build() if loss is None else loss
        values = loss(batch.inputs(self.reads))
        require(isinstance(values, Tensor), f"the loss returned {type(values).__name__}, expected a tensor [N]")
        found, expected = list(values.shape), [len(batch)]
        require(
            found == expected,
            f"{len(batch)} rows gave a result of shape {found}, expected {expected}. Return one value for each row; "
            "the engine reduces",
        )
        return values  # type: ignore[no-any-return]

    def evaluate(self, batch: SampleBatch, loss: Loss | None = None) -> tuple[Tensor, Tensor]:
        """Values `[N]`, and the gradient of their sum with respect to the student `[N, K]`."""
        student_NK = batch.student.detach().clone().requires_grad_()
        values_N = self.values(batch.with_student(student_NK), loss)
        (gradient,) = torch.autograd.grad(values_N.sum(), student_NK, allow_unused=True)
        return values_N.detach(), torch.zeros_like(student_NK) if gradient is None else gradient


@dataclass(frozen=True)
class Check:
    """A named check: `run` raises CheckFailed, CheckSkipped or CheckWarned, or returns.

    families   the losses that it applies to
    logits     and only those that read logits
    tokens     and only those that read log-probs of single tokens of a pair
    trait      and only those that make this promise
    requires   checks without which its judgement means nothing
    """

    run: Callable[[LossUnderTest], None]
    families: frozenset[Family] = field(default=frozenset(Family))
    logits: bool = False
    tokens: bool = False
    trait: Trait | None = None
    requires: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.run.__name__

    def applies(self, spec: LossSpec) -> bool:
        """Whether a loss of this family and with these traits is to be checked."""
        if self.logits and HIDDEN & spec.signals():
            return False
        if self.tokens and not spec.signals() & set(TOKEN_LOGPS.values()):
            return False
        return spec.family in self.families and (self.trait is None or self.trait in spec.traits)


def fail(message: str) -> None:
    """Raises CheckFailed."""
    raise CheckFailed(message)


def require(condition: bool, message: str) -> None:
    """Raises CheckFailed with the message unless the condition holds."""
    if not condition:
        fail(message)


def require_close(found: Tensor, expected: Tensor, message: str, *, atol: float = 1e-5, rtol: float = 1e-4) -> None:
    """Raises CheckFailed with the message and the worst place, unless both are equal within the tolerance."""
    found, expected = found.detach().double(), expected.detach().double()
    if torch.allclose(found, expected, atol=atol, rtol=rtol, equal_nan=True):
        return
    excess = (found - expected).abs() - rtol * expected.abs()
    worst = int(excess.nan_to_num(nan=float("inf")).argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), found.shape)]
    where = f" at {index}" if index else ""
    fail(f"{message}: found {found.flatten()[worst]:.6g}, expected {expected.flatten()[worst]:.6g}{where}")
