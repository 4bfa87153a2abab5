"""Inputs for the built-in losses: by hand, or random with a seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpkd.api import Family, LossSpec, Pair, PairInputs, Rollout, RolloutInputs, Signal, TokenInputs

FLOAT64 = torch.float64


def randn(*shape: int, seed: int, scale: float = 2.0, dtype: torch.dtype = FLOAT64) -> Tensor:
    """Normal numbers of a scale."""
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)).to(dtype)


def token_inputs(
    student: Tensor | list[Any], teacher: Tensor | list[Any] | None = None, targets: list[int] | Tensor | None = None
) -> TokenInputs:
    """Token inputs that hold what is given, and nothing else."""
    logits = torch.as_tensor(student)
    signals: dict[Signal, Any] = {Signal.STUDENT_LOGITS: logits, Signal.CHOSEN_IDS: logits.argsort(-1, descending=True)}
    if teacher is not None:
        signals[Signal.TEACHER_LOGITS] = torch.as_tensor(teacher)
    if targets is not None:
        signals[Signal.TARGETS] = torch.as_tensor(targets, dtype=torch.long)
    return TokenInputs(signals)


def hidden_inputs(student: Tensor | list[Any], teacher: Tensor | list[Any]) -> TokenInputs:
    """Hidden states `[N, K, H]` of student and teacher, and nothing else."""
    signals = {Signal.STUDENT_HIDDEN: torch.as_tensor(student), Signal.TEACHER_HIDDEN: torch.as_tensor(teacher)}
    return TokenInputs(signals)


def pair_inputs(
    student: tuple[Any, Any],
    lengths: tuple[Any, Any],
    teacher: tuple[Any, Any] | None = None,
    reference: tuple[Any, Any] | None = None,
) -> PairInputs:
    """Pair inputs that hold what is given, and nothing else."""

    def pair(values: tuple[Any, Any]) -> Pair:
        return Pair(*(torch.as_tensor(v, dtype=None if torch.is_tensor(v) else FLOAT64) for v in values))

    signals: dict[Signal, Any] = {Signal.STUDENT_LOGPS: pair(student), Signal.LENGTHS: pair(lengths)}
    if teacher is not None:
        signals[Signal.TEACHER_LOGPS] = pair(teacher)
    if reference is not None:
        signals[Signal.REFERENCE_LOGPS] = pair(reference)
    return PairInputs(signals)


def random_pairs(count: int, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Student log-probs, lengths and teacher log-probs of `count` pairs: sums over 1 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [torch.randint(1, 10, (count,), generator=generator).to(FLOAT64) for _ in range(2)]
    logps = [-n * torch.rand(count, generator=generator, dtype=FLOAT64) for n in lengths * 2]
    return (logps[0], logps[1]), (lengths[0], lengths[1]), (logps[2], logps[3])


def rollout_inputs(
    student: Tensor, teacher: Tensor, targets: Tensor, rollout: Tensor, behaviour: Tensor, advantages: Tensor
) -> RolloutInputs:
    """Inputs of a rollout loss."""
    return RolloutInputs(
        {
            Signal.STUDENT_LOGITS: student,
            Signal.TEACHER_LOGITS: teacher,
            Signal.TARGETS: targets,
            Signal.ROLLOUT_LOGPS: rollout,
            Signal.BEHAVIOUR_LOGPS: behaviour,
            Signal.ADVANTAGES: advantages,
        }
    )


def one_sequence(rollout: list[float], teacher: list[float], behaviour: list[float] | None = None) -> Rollout:
    """One response as a collection."""
    old = torch.tensor(rollout, dtype=FLOAT64)
    drawn = old if behaviour is None else torch.tensor(behaviour, dtype=FLOAT64)
    return Rollout(old, drawn, torch.tensor(teacher, dtype=FLOAT64), torch.zeros(len(rollout), dtype=torch.long))


def inputs_of(
    spec: LossSpec, config: Any, student: Tensor, teacher: Tensor
) -> TokenInputs | PairInputs | RolloutInputs:
    """What a loss declares, and nothing else: from logits `[N, V]`, or (pairs) from log-probs `[N, 2]`."""
    if spec.family is Family.PAIR:
        lengths = torch.arange(1, len(student) + 1, dtype=torch.float32)
        signals: dict[Signal, Any] = {
            Signal.STUDENT_LOGPS: Pair(student[:, 0], student[:, 1]),
            Signal.TEACHER_LOGPS: Pair(teacher[:, 0], teacher[:, 1]),
            Signal.REFERENCE_LOGPS: Pair(teacher[:, 0] - 0.5, teacher[:, 1] - 0.25),
            Signal.LENGTHS: Pair(lengths, lengths + 1),
        }
        return PairInputs({k: v for k, v in signals.items() if k in spec.signals(config)})
    count, vocabulary = student.shape
    targets = torch.arange(count) % vocabulary
    logps = student.detach().float().log_softmax(-1)[torch.arange(count), targets]
    signals = {
        Signal.STUDENT_LOGITS: student,
        Signal.TEACHER_LOGITS: teacher,
        Signal.TARGETS: targets,
        Signal.CHOSEN_IDS: student.detach().argsort(-1, descending=True),
        Signal.BY_STUDENT: torch.arange(count) % 2 == 0,
        Signal.ROLLOUT_LOGPS: logps,
        Signal.BEHAVIOUR_LOGPS: logps + 0.1,
        Signal.TEACHER_LOGPS: logps - 0.2,
        Signal.ADVANTAGES: torch.linspace(-1, 1, count),
        Signal.STUDENT_REST: -torch.arange(count).remainder(3).to(logps.dtype),
        Signal.TEACHER_REST: -torch.arange(count).remainder(3).to(logps.dtype),
    }
    kind = RolloutInputs if spec.family is Family.ROLLOUT else TokenInputs
    return kind({k: v for k, v in signals.items() if k in spec.signals(config)})


def row_of(x: TokenInputs | PairInputs | RolloutInputs, i: int) -> TokenInputs | PairInputs | RolloutInputs:
    """The same inputs, with one row only."""
    signals = {}
    for signal, value in x._signals.items():
        signals[signal] = Pair(*(v[i : i + 1] for v in value)) if isinstance(value, Pair) else value[i : i + 1]
    return type(x)(signals)
