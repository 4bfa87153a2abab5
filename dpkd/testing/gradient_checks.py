"""Checks of the gradient, of a loss's own weights, and of a short training. N rows, K columns of the student."""

from __future__ import annotations

import torch
from torch import Tensor

from dpkd.api import Loss, Trait
from dpkd.testing.inputs import SampleBatch
from dpkd.testing.results import CheckSkipped
from dpkd.testing.subject import FOUNDATION, WITH_GRADIENT, Check, LossUnderTest, require, require_close

STEPS = 20


def gradient_reaches_the_student_only(subject: LossUnderTest) -> None:
    """The value has a gradient to the student; no other signal gets one."""
    batch = subject.batch(seed=8)
    student_NK = batch.student.clone().requires_grad_()
    x = batch.with_student(student_NK).inputs(subject.reads)
    values_N = subject.build()(x)
    require(
        values_N.requires_grad,
        "no gradient reaches the student: is there a detach, a no_grad, or an .item() in the way?",
    )
    values_N.sum().backward()
    reached = student_NK.grad is not None and bool((student_NK.grad != 0).any())
    require(reached, "the gradient with respect to the student is zero on ordinary inputs")
    for signal, given in x._signals.items():
        for tensor in given if isinstance(given, tuple) else (given,):
            own = tensor.is_leaf and tensor.requires_grad
            require(not own, f"the loss lets a gradient into {signal.value!r}: only the student is trained")


def gradient_is_the_derivative(subject: LossUnderTest) -> None:
    """Autograd equals central differences, along random directions, in float64."""
    traits = subject.spec.traits & {Trait.SCORE_FUNCTION, Trait.DETACHED_WEIGHTS}
    if traits:
        raise CheckSkipped(
            f"the loss promises {', '.join(sorted(traits))}: autograd differs from differences by design"
        )
    generator = torch.Generator().manual_seed(9)
    loss = subject.build(torch.float64)
    for seed in range(3):
        batch = subject.batch(seed=seed, dtype=torch.float64)
        direction_NK = torch.randn(batch.student.shape, generator=generator, dtype=torch.float64)
        _, gradient_NK = subject.evaluate(batch, loss)
        slope, close = _slope(subject, batch, direction_NK, loss)
        require_close(
            (gradient_NK * direction_NK).sum(),
            slope,
            "autograd is not the derivative: is there a stray detach or a wrong custom backward? (Where a weight is "
            "detached on purpose, promise Trait.DETACHED_WEIGHTS)",
            atol=close,
            rtol=close,
        )


def _slope(subject: LossUnderTest, batch: SampleBatch, direction_NK: Tensor, loss: Loss) -> tuple[Tensor, float]:
    """Derivative of the summed values along a direction, by differences, and the tolerance that it deserves."""

    def total(distance: float) -> Tensor:
        student_NK = batch.student + distance * direction_NK
        return subject.values(batch.with_student(student_NK), loss).detach().double().sum()

    def slope(step: float) -> Tensor:
        return (total(step) - total(-step)) / (2 * step)

    fine, coarser = slope(1e-6), slope(1e-5)
    if torch.allclose(fine, coarser, rtol=1e-4, atol=1e-5):
        return coarser, 1e-5
    # Small steps drown in rounding: the loss works in float32 whatever it gets, which it may.
    return slope(1e-2), 2e-2


def state_dict_round_trip(subject: LossUnderTest) -> None:
    """A new instance with the state dict of another gives the same values: nothing that matters is left out."""
    batch = subject.batch(seed=10)
    one, other = subject.build(seed=1), subject.build(seed=2)
    other.load_state_dict(one.state_dict())
    require_close(
        subject.values(batch, other),
        subject.values(batch, one),
        "the state dict does not hold all of the loss's state, so that a checkpoint would not either: use "
        "nn.Parameter, or register_buffer with persistent=True",
        atol=0,
        rtol=1e-6,
    )


def weights_train(subject: LossUnderTest) -> None:
    """A loss that owns weights gets a finite gradient for each, and a small step along it lowers the loss."""
    loss, batch = subject.build(), subject.batch(seed=11)
    weights = {name: w for name, w in loss.named_parameters() if w.requires_grad}
    if not weights:
        raise CheckSkipped("the loss owns no weights")
    before = subject.values(batch, loss).sum()
    gradients = torch.autograd.grad(before, list(weights.values()), allow_unused=True)
    for name, gradient in zip(weights, gradients, strict=True):
        require(gradient is not None, f"no gradient reaches the loss's weight {name!r}")
        assert gradient is not None
        require(bool(gradient.isfinite().all()), f"the gradient of the loss's weight {name!r} is not finite")
    squared = sum(float(g.square().sum()) for g in gradients)
    require(squared > 0, "the gradient of every weight of the loss is zero on ordinary inputs")
    if Trait.SCORE_FUNCTION in subject.spec.traits:
        return
    # A step that would lower a straight line by a thousandth of the value.
    rate = 1e-3 * max(abs(before.item()), 1.0) / squared
    with torch.no_grad():
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            weight.sub_(rate * gradient)
    after = subject.values(batch, loss).sum().item()
    require(after < before.item(), f"a step of the loss's weights went from {before.item():.6g} up to {after:.6g}")


def short_run_lowers_the_loss(subject: LossUnderTest) -> None:
    """Twenty steps of Adam on a table of student logits (or log-probs), against a fixed teacher, lower the loss."""
    if Trait.SCORE_FUNCTION in subject.spec.traits:
        raise CheckSkipped("the value of a score function means nothing")
    batch, loss = subject.batch(8, seed=12), subject.build()
    table_NK = torch.nn.Parameter(batch.student.clone())
    optimizer = torch.optim.Adam([table_NK, *loss.parameters()], lr=0.1)
    history = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        mean = subject.values(batch.with_student(table_NK), loss).mean()
        mean.backward()
        optimizer.step()
        history.append(mean.item())
    with torch.no_grad():
        history.append(_mean(subject.values(batch.with_student(table_NK), loss)))
    require(history[-1] < history[0], f"{STEPS} steps took the loss from {history[0]:.6g} to {history[-1]:.6g}")


def _mean(values_N: Tensor) -> float:
    return values_N.mean().item()


CHECKS = (
    Check(gradient_reaches_the_student_only, requires=FOUNDATION),
    Check(gradient_is_the_derivative, requires=WITH_GRADIENT),
    Check(state_dict_round_trip, requires=FOUNDATION),
    Check(weights_train, requires=WITH_GRADIENT),
    Check(short_run_lowers_the_loss, requires=WITH_GRADIENT),
)
