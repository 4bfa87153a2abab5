"""Runs parts of a step without its memory, and counts the bytes that it would hold at once.

Fake tensors have a shape, a type and a device, and no values: a model of any size runs on them in a moment. What an
architecture does is what is counted, so there is no formula per architecture; where one asks for values (a fake
tensor has none), the caller needs another way.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpkd.api import RolloutInputs, Signal, TokenInputs
from dpkd.functional import log_softmax
from dpkd.models.head import hidden_states
from dpkd.train.mean_metrics import MeanMetrics
from dpkd.train.observe import observe_rows

ROWS, VOCABULARY = 8, 4096  # of the logits on which a loss is looked at: the share of what is [n] alone is small


class LiveBytes(TorchDispatchMode):
    """Counts, while it is entered, the bytes of the tensors that were made since and are still there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # A view of what was there before, of a weight say, is nothing new.
        before = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage._cdata not in before:
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def fill(model: nn.Module) -> None:
    """Give a model of the meta device empty parameters and buffers, in place; what was tied stays tied."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, old in kept.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                kept[name] = made[id(old)]  # type: ignore[assignment]


class Passes(NamedTuple):
    """Of a backbone, in bytes: what is there after its forward, and the most at once in its backward."""

    kept: int
    backward: int


def backbone_passes(student: nn.Module, sequences: int, tokens: int, *, bf16: bool) -> Passes:
    """Run a student's backbone forward and backward on `sequences` x `tokens` ids; call it in a fake mode.

    The backward counts the gradients of the backbone's weights as they come, and none of the output head's.
    """
    ids = torch.zeros(sequences, tokens, dtype=torch.long)
    # A mask of four dimensions is used as it is; one of two would be looked into, and a fake one has no values.
    mask = torch.ones(sequences, 1, tokens, tokens, dtype=torch.bool)
    with LiveBytes() as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = hidden_states(student, ids, mask, ids)
        kept = live.now
        live.peak = live.now
        hidden.sum().backward()
    return Passes(kept, live.peak)


def sample_inputs(
    reads: frozenset[Signal], device: torch.device | str = "cpu", vocabulary: int = VOCABULARY
) -> tuple[Tensor, TokenInputs]:
    """The student's logits `[n, V]`, with gradient, and all that a token or rollout loss reads beside them, made up."""
    drawn = {Signal.ROLLOUT_LOGPS, Signal.BEHAVIOUR_LOGPS, Signal.TEACHER_LOGPS, Signal.ADVANTAGES} & reads
    raw_nV, teacher_nV = (_logits(vocabulary).to(device) for _ in range(2))
    raw_nV.requires_grad_()
    signals: Mapping[Signal, Tensor] = {
        Signal.STUDENT_LOGITS: raw_nV,
        Signal.TEACHER_LOGITS: teacher_nV,
        Signal.TARGETS: torch.zeros(ROWS, dtype=torch.long, device=device),
        Signal.BY_STUDENT: torch.arange(ROWS, device=device) % 2 == 0,
        **{signal: torch.full((ROWS,), -1.0, device=device) for signal in drawn},
    }
    return raw_nV, RolloutInputs(signals) if drawn else TokenInputs(signals)


def token_chunk(loss: nn.Module, reads: frozenset[Signal]) -> float:
    """The most at once in the forward and backward of a token or rollout loss, as a number of `[n, V]` tensors.

    Losses may look at values, so this runs on real tensors, small ones.
    """
    with LiveBytes() as live:
        raw_nV, inputs = sample_inputs(reads)
        total = loss(inputs.only(reads)).sum()
        # A step that is logged measures divergences too, while the graph of the loss is there.
        log_p_nV = inputs.teacher_log_probs() if Signal.TEACHER_LOGITS in reads else None
        observe_rows(inputs.student_log_probs(), log_p_nV, inputs.targets, MeanMetrics())
        del inputs, log_p_nV
        torch.autograd.grad(total, raw_nV)
    return float(live.peak / (4 * ROWS * VOCABULARY))


def fused_chunk(*, reads_teacher: bool) -> float:
    """The same of a sum of KL divergences that a kernel computes: what a step that is logged measures before it."""
    with LiveBytes() as live, torch.no_grad():
        raw_nV, teacher_nV = _logits(), _logits() if reads_teacher else None
        log_q_nV = log_softmax(raw_nV)
        log_p_nV = None if teacher_nV is None else log_softmax(teacher_nV)
        observe_rows(log_q_nV, log_p_nV, torch.zeros(ROWS, dtype=torch.long), MeanMetrics())
    return float(live.peak / (4 * ROWS * VOCABULARY))


def pair_chunk() -> float:
    """The same where log-probs of responses are taken, on a step that is logged."""
    with LiveBytes() as live, torch.no_grad():
        log_q_nV = log_softmax(_logits())
        log_p_nV = log_softmax(_logits())
        observe_rows(log_q_nV, log_p_nV, torch.zeros(ROWS, dtype=torch.long), MeanMetrics())
    return float(live.peak / (4 * ROWS * VOCABULARY))


def _logits(vocabulary: int = VOCABULARY) -> Tensor:
    """Small logits with distinct values, from no random state."""
    return torch.linspace(-3.0, 3.0, ROWS * vocabulary).view(ROWS, vocabulary).sin()
