"""The longest forward and backward pass of a run, before its first step: memory runs out now, or never.

What the student and the teacher will write is not known yet; it is taken to be as long as it may become.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from dpkd.api import Family, Text
from dpkd.rollout.response import Response
from dpkd.rollout.sources import StepResponses, Writers
from dpkd.train import checkpoint
from dpkd.train.microbatch import MicroBatch
from dpkd.train.step_batches import StepBatchBuilder
from dpkd.train.train_step import TrainStep


def probe(train_step: TrainStep, builder: StepBatchBuilder, size: int, context: int | None) -> str:
    """Run the longest micro-batch of each step batch, with an update that changes nothing; says what it was.

    `size` is the number of examples of a step, `context` the longest sequence that the models read. Weights,
    optimizer, states of losses and random numbers are afterwards what they were.
    """
    prompts = builder.prompts
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].prompt_ids) - len(prompts[i].response_ids))
    texts = [longest_text(group.writers, size, context) for group in builder.groups]
    blocks = list(range(min(size, len(builder.corpus.blocks)))) if builder.corpus is not None else []
    step_batches = builder.build(texts, order[:size], blocks)
    micro_batches = [
        train_step.micro_batcher(step_batch, measure=True)[0] for step_batch in step_batches if step_batch.groups
    ]
    _run(train_step, micro_batches)
    return "; ".join(f"{micro_batch.name}: {_shape(micro_batch)}" for micro_batch in micro_batches)


def longest_text(writers: Writers, size: int, context: int | None) -> StepResponses:
    """The text of the `size` examples that may become the longest."""
    choices = _choices(writers)
    bounds = {
        i: max((tuple(_length(writers, i, w, context) for w in choice) for choice in choices), key=sum)
        for i in range(len(writers.prompts))
    }
    longest = sorted(bounds, key=lambda i: -len(writers.prompts[i].prompt_ids) - sum(bounds[i]))[:size]
    copies = writers.settings.num_generations if any(Text.STUDENT in choice for choice in choices) else 1
    responses = [
        (i, copies * tuple(_filler(n, writer, writers) for n, writer in zip(bounds[i], choices[0], strict=True)))
        for i in longest
    ]
    return StepResponses(responses, {})


def _choices(writers: Writers) -> list[tuple[Text, ...]]:
    """Who may write at a step."""
    if writers.family is not Family.PAIR and writers.settings.source == "mixed":
        return [(writer,) for writer in writers.settings.mix]
    return [writers.writers(0)]


def _length(writers: Writers, index: int, writer: Text, context: int | None) -> int:
    """The largest number of tokens of a response."""
    prompt, settings = writers.prompts[index], writers.settings
    if writer is Text.DATASET:
        return len(prompt.response_ids)
    sampling = settings.teacher_sampling if writer is Text.TEACHER else settings.sampling
    room = sampling.max_new_tokens if context is None else context - len(prompt.prompt_ids)
    return max(1, min(sampling.max_new_tokens, room))


def _filler(length: int, writer: Text, writers: Writers) -> Response:
    """A response of a length; the ids do not matter."""
    if writers.family is not Family.ROLLOUT:
        return Response((0,) * length, writer)
    zeros = (0.0,) * length
    return Response((0,) * length, writer, False, zeros, zeros, zeros, zeros)


def _run(train_step: TrainStep, micro_batches: Sequence[MicroBatch]) -> None:
    """Forward, backward and an update with a rate of 0, twice: in the second the optimizer has its state."""
    optimizer = getattr(train_step.optimizer, "optimizer", train_step.optimizer)
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


def out_of_memory(error: RuntimeError) -> str | None:
    """What to say when an error means that memory ran out, on a GPU or a CPU; None for any other."""
    if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
        return None
    return (
        "the memory of the device is too small for this run. Lower train.micro_batch_size, or set batch.tokens: "
        "neither changes a result. Less is needed too with student.gradient_checkpointing=true, train.precision=bf16 "
        "and student.lora, and for sampling with a lower text.sampling.batch_size."
    )
