"""The longest forward and backward pass of a run, before its first step: memory runs out now, or never.

What the student and the teacher will write is not known yet; it is taken to be as long as it may become.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from dpkd.api import Response, Signal, StepResponses, Text
from dpkd.train import checkpoint
from dpkd.train.microbatch import MicroBatch
from dpkd.train.step_batches import LossGroup, StepBatchBuilder
from dpkd.train.train_step import TrainStep


def probe(train_step: TrainStep, builder: StepBatchBuilder, size: int) -> str:
    """Run the longest micro-batch of each step batch, with an update that changes nothing; says what it was.

    `size` is the number of examples of a step. Weights, optimizer, states of losses and random numbers are
    afterwards what they were.
    """
    prompts = builder.prompts
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].prompt_ids) - len(prompts[i].response_ids))
    texts = [longest_responses(group, size) for group in builder.groups]
    blocks = list(range(min(size, len(builder.corpus.blocks)))) if builder.corpus is not None else []
    step_batches = builder.build(texts, order[:size], blocks)
    micro_batches = [
        train_step.micro_batcher(step_batch, measure=True)[0] for step_batch in step_batches if step_batch.groups
    ]
    _run(train_step, micro_batches)
    return "; ".join(f"{micro_batch.name}: {_shape(micro_batch)}" for micro_batch in micro_batches)


def longest_responses(group: LossGroup, size: int) -> StepResponses:
    """The responses of the `size` examples that may become the longest."""
    prompts, longest = group.source.context.prompts, group.source.describe().longest
    bounds = [longest(i) for i in range(len(prompts))]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].prompt_ids) - sum(n for _, n in bounds[i]))
    sampled = any(Signal.ADVANTAGES in reads for reads, _ in group.losses.values())
    return StepResponses([(i, tuple(_filler(n, w, sampled) for w, n in bounds[i])) for i in order[:size]], {})


def _filler(length: int, writer: Text, sampled: bool) -> Response:
    """A response of a length; the ids do not matter."""
    zeros = torch.zeros(length) if sampled else None
    return Response((0,) * length, writer, False, zeros, zeros, zeros, zeros)


def _run(train_step: TrainStep, micro_batches: Sequence[MicroBatch]) -> None:
    """Forward, backward and an update with a rate of 0, twice: in the second the optimizer has its state."""
    optimizer = train_step.torch_optimizer
    is_new, losses = not optimizer.state, train_step.inner.losses
    random_state = checkpoint.random_state(train_step.accelerator.device)
    kept = copy.deepcopy(losses.state_dict())
    for _ in range(2 if is_new else 1):
        train_step.optimizer.zero_grad(set_to_none=True)
        for micro_batch in micro_batches:
            train_step.micro_step(micro_batch)
        if is_new:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            train_step.optimizer.step()
    train_step.optimizer.zero_grad(set_to_none=True)
    if is_new:
        optimizer.state.clear()
    losses.load_state_dict(kept)
    checkpoint.set_random_state(random_state, train_step.accelerator.device)


def _shape(micro_batch: MicroBatch) -> str:
    rows, tokens = micro_batch.batch.input_ids.shape
    return f"{len(micro_batch.batch.sequences)} sequences, {rows} x {tokens} tokens"
