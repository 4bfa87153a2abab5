"""How much memory a run will take at its peak, worked out before any weight is loaded.

The forward and backward of the student and of the losses are run without their memory (`dpkd.train.memory_trace`);
weights, gradients, the optimizer and sampling are counted. `benchmarks/memory.py` compares the estimate with the
peaks of real runs.
"""

from __future__ import annotations

import os
import platform
from copy import deepcopy
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import nn

from dpkd.api import Family, SamplerMemory, SamplerSpec, Signal, Text
from dpkd.api.inputs import REFERENCE_LOGPS
from dpkd.config.objective import Objective
from dpkd.config.resolve import Resolved
from dpkd.config.settings import RunSettings
from dpkd.models.attention import recomputes
from dpkd.models.chunked import block_rows, chunk_rows
from dpkd.models.device import device_of, memory_of, precision_of, teacher_dtype
from dpkd.models.fused import kl_sum_of
from dpkd.models.fused import why_not as why_not_fused
from dpkd.models.head import repeated_blocks
from dpkd.models.layouts import worth_packing
from dpkd.models.loading import new_model
from dpkd.models.lora import add_lora
from dpkd.models.optimizers import state_bytes
from dpkd.models.quantization import quantization_of, weight_bytes
from dpkd.models.sharding import sharding
from dpkd.models.student_init import recompute_activations, switch_dropout_off
from dpkd.train.memory_trace import Passes, backbone_passes, fill, fused_chunk, pair_chunk, token_chunk
from dpkd.train.microbatch import WORTH_SAVING
from dpkd.train.prepare import RunData
from dpkd.train.rollouts import open_source

FLOAT = 4  # bytes: the student's weights, its gradients and the optimizer's state are float32
# What glibc's malloc holds of memory that was freed: a share of all that comes and goes in a step; and, where
# activations are computed again, one of what there would be otherwise. Measured by benchmarks/memory.py.
HELD, HELD_OF_RECOMPUTED = 0.28, 0.6
HELD_BY_MALLOC = "freed, held by malloc"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose at the moment of the run that takes the most, and that moment."""

    moment: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class _Counts:
    """Parameters of the student, the trained ones, the largest of these; bytes of optimizer state and passes.

    gathered  parameters that are whole at a time where the student is sharded: all that is in no layer, and two layers
    """

    parameters: int
    trained: int
    largest: int
    gathered: int
    optimizer: float
    passes: Passes


@dataclass(frozen=True)
class _Batch:
    """The largest micro-batch: rows, tokens of each, and how many of these are of a response at most."""

    sequences: int
    tokens: int
    response: int


def memory_estimate(resolved: Resolved, run_data: RunData) -> MemoryEstimate:
    """The peak of a run on one device; of a student that is sharded, that of each process."""
    settings = resolved.settings
    dtype = teacher_dtype(settings.train.precision, device_of(settings.train.device))
    meta = meta_student(settings, run_data.student_config)
    batch = _largest_batch(resolved, run_data, packs=_packs(settings, meta))
    student = _count(settings, run_data.student_config, meta, batch)
    references = any(REFERENCE_LOGPS & objective.reads for objective in resolved.objectives)
    shards = sharding()
    weights = student_bytes(settings, run_data.student_config, student.parameters)
    held = shards.held("weights", weights)
    whole = weights - held  # what a process gathers to have all of them
    copy = float(FLOAT * student.trained) * shards.copies
    always = {
        "student weights": held + weights * references,
        "teacher weights": 0.0 if run_data.teacher is None else run_data.teacher.weight_bytes(dtype),
        "optimizer state": shards.held("optimizer", student.optimizer + copy),
    }
    engine = _engine(resolved, student.parameters)
    if engine is not None and engine.training:
        always["engine of the sampler"] = engine.training
    gathered = {"gathered layers": min(whole, float(FLOAT * student.gathered))}
    gradients = shards.held("gradients", float(FLOAT * student.trained))
    text = run_data.student_config.get_text_config()
    head = float(FLOAT * text.vocab_size * text.hidden_size) if student.trained == student.parameters else 0.0
    # A step begins without gradients. The losses make that of the head, while the activations are there; later
    # micro-batches of the step find all of them.
    again = _micro_batches(resolved) > 1
    begun = gradients if again else head
    logits = _chunk_bytes(resolved, batch, text.vocab_size)
    # Where gradients are there already, those that come are added to them one by one; the peak is then at the start.
    backward = min(student.passes.backward, 1.1 * student.passes.kept) if again else student.passes.backward
    # An optimizer goes over the parameters one by one, with two temporaries of the size of each; or over one flat
    # vector, to which the gradients are copied.
    temporaries = shards.held("optimizer", copy) if shards.copies else 2.0 * FLOAT * student.largest
    moments = [
        MemoryEstimate(
            "losses",
            {**always, **gathered, "gradients": begun, "activations": student.passes.kept, "logits, a chunk": logits},
        ),
        MemoryEstimate("backward", {**always, **gathered, "gradients": begun, "activations, new gradients": backward}),
        MemoryEstimate("update", {**always, "gradients": gradients, "temporaries": temporaries}),
    ]
    if Text.STUDENT in resolved.main.writers:
        drawn = (
            {"cache and logits": _sampling_bytes(resolved, run_data)}
            if engine is None
            else {"engine of the sampler": engine.drawing}
        )
        moments.append(MemoryEstimate("sampling", {**always, "gathered weights": whole, **drawn}))
    peak = max(moments, key=lambda estimate: estimate.total)
    if not malloc_holds(settings):
        return peak
    held = HELD * (peak.total - sum(always.values()))
    if recomputes(meta):
        plain = meta_student(settings, run_data.student_config, recompute=False)
        held = HELD_OF_RECOMPUTED * _count(settings, run_data.student_config, plain, batch).passes.kept
    return MemoryEstimate(peak.moment, {**peak.parts, HELD_BY_MALLOC: held})


def malloc_holds(settings: RunSettings) -> bool:
    """Whether the run is on a CPU, and glibc's malloc, as it is by default, takes care of its memory."""
    if device_of(settings.train.device).type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    told = any(name.startswith("MALLOC_") for name in os.environ)
    return not told and "malloc" not in os.environ.get("LD_PRELOAD", "")


def _packs(settings: RunSettings, student: nn.Module) -> bool:
    """Whether sequences will stand one behind the other, as far as settings tell: a run tries its models too."""
    device = device_of(settings.train.device)
    if settings.batch.packing != "auto":
        return settings.batch.packing == "on"
    if device.type == "cuda":
        return precision_of(settings.train.precision, device) == "bf16" and not recomputes(student)
    return settings.train.compile != "on" and not recomputes(student) and worth_packing(student)


def _largest_batch(resolved: Resolved, run_data: RunData, *, packs: bool) -> _Batch:
    """The longest sequences of the data, as many as a micro-batch has, at their own lengths where a run `packs` them.

    Else all have the length of the longest. A sequence is one of the data set, or a prompt with all that may be
    sampled.
    """
    settings = resolved.settings
    bounds = open_source(resolved.main, resolved, run_data).describe().longest
    lm = settings.terms.lm.weight > 0
    lengths = [
        (len(p.prompt_ids), max([length for _, length in bounds(i)] + [len(p.response_ids)] * lm))
        for i, p in enumerate(run_data.data.prompts)
    ]
    pairs = resolved.loss.family is Family.PAIR
    sequences = min(settings.train.micro_batch_size, settings.train.batch_size * (2 if pairs else 1))
    behind = 1
    if pairs and settings.batch.shared_prompts:  # both responses in one row, behind one copy of the prompt
        sequences, behind = max(1, sequences // 2), 2
    whole = sorted((prompt + behind * response for prompt, response in lengths), reverse=True)
    longest, response = whole[0], behind * max(response for _, response in lengths)
    if settings.batch.tokens is not None:
        sequences = max(1, min(sequences, settings.batch.tokens // longest))
    if packs and not pairs:
        drawn = max(1, resolved.main.text.student_sampling.num_generations)
        several = [length for length in whole for _ in range(drawn)]
        mean = -(-sum(islice(cycle(several), sequences)) // sequences)
        if mean <= (1 - WORTH_SAVING) * longest:
            longest = mean
    return _Batch(sequences, longest, response)


def _micro_batches(resolved: Resolved) -> int:
    """Forward passes of the student in an optimizer step."""
    settings = resolved.settings
    per_unit = 2 if resolved.loss.family is Family.PAIR else 1
    groups = max(1, settings.train.micro_batch_size // per_unit)
    others = sum(not objective.shares_text for objective in resolved.extras)
    others += (settings.terms.lm.weight > 0) + (settings.terms.pretrain.weight > 0)
    return -(-settings.train.batch_size // groups) + others


def _engine(resolved: Resolved, parameters: int) -> SamplerMemory | None:
    """What a sampler of the student takes that does not draw with the model itself."""
    text = resolved.main.text
    if Text.STUDENT not in resolved.main.writers:
        return None
    spec = resolved.registry.get(SamplerSpec, text.backend).spec
    if spec.memory is None:
        return None
    device = device_of(resolved.settings.train.device)
    total = memory_of(device) if device.type == "cuda" else None
    return spec.memory(spec.config(**text.backend_settings), parameters, total)


def _sampling_bytes(resolved: Resolved, run_data: RunData) -> float:
    """The cache of keys and values of the prompts sampled together, and the logits of one token of each."""
    sampling = resolved.settings.text.sampling
    text = run_data.student_config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    prompt = max(len(p.prompt_ids) for p in run_data.data.prompts)
    cached = 2 * text.num_hidden_layers * (prompt + sampling.max_new_tokens) * width
    # A cache grows by concatenation: the old and the new tensors of a layer are there together.
    cached += cached // text.num_hidden_layers
    return float(FLOAT * sampling.batch_size * (cached + 4 * text.vocab_size))


def _chunk_bytes(resolved: Resolved, batch: _Batch, vocabulary: int) -> float:
    """The most that a loss holds of one chunk of logits, over all losses of the run."""
    mib, device = resolved.settings.train.chunk_mib, device_of(resolved.settings.train.device)
    most = batch.sequences * batch.response
    rows, fused = (min(chunk_rows(vocabulary, mib, device, fused=one), most) for one in (False, True))
    # Of a chunk there are the logits of both models; what is computed of them, a block at a time on a CPU.
    block = min(rows, block_rows(vocabulary)) if device.type == "cpu" else rows
    most_rows = max(_rows_held(objective, rows, block, device) for objective in resolved.objectives)
    # Of the rows of a fused loss that are not measured, on a GPU, there are the logits alone, in half precision.
    return FLOAT * vocabulary * (most_rows + (fused - rows))


def _rows_held(objective: Objective, rows: int, block: int, device: torch.device) -> float:
    """Rows of V numbers that are there at once while a loss works on a chunk of `rows`, and in it on a `block`."""
    if objective.spec.family is Family.PAIR:
        return pair_chunk() * rows
    try:
        loss = objective.spec.loss(objective.config)
        terms = kl_sum_of(loss)
        if terms is not None and why_not_fused(device.type) is None:
            copies, held = fused_chunk(reads_teacher=terms.reads_teacher), 1 + 2 * terms.reads_teacher
        else:
            copies, held = token_chunk(loss, objective.reads), 1 + (Signal.TEACHER_LOGITS in objective.reads)
    except Exception:  # a stranger's loss, on made-up logits: a plan must not fail for it
        # Logits, log-probs and probabilities of both models, the terms of the sum, and their gradients.
        copies, held = 10.0, 2
    return copies * rows if block == rows else copies * block + held * rows


def _count(settings: RunSettings, config: Any, student: nn.Module, batch: _Batch) -> _Counts:
    """Count the student without weights; where it does not run on fake tensors, its passes follow a rule of thumb."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    trained = [p.numel() for p in student.parameters() if p.requires_grad]
    parameters = sum(p.numel() for p in student.parameters())
    try:
        # Fake tensors, unlike those of the meta device, take the way of a real device: its attention code above all.
        with FakeTensorMode():
            fill(student)
            bf16 = precision_of(settings.train.precision, device_of(settings.train.device)) == "bf16"
            passes = backbone_passes(student, batch.sequences, batch.tokens, bf16=bf16)
    except Exception:  # whatever an architecture does that needs values: a plan must not fail for it
        passes = _rule_of_thumb(settings, config, batch.sequences * batch.tokens, sum(trained))
    layers = [sum(p.numel() for p in one.parameters()) for one in repeated_blocks(student)]
    gathered = parameters - sum(layers) + 2 * max(layers, default=0)
    state = state_bytes(student, settings.train.optimizer, settings.train.own_optimizer_settings)
    return _Counts(parameters, sum(trained), max(trained), gathered, state, passes)


def meta_student(settings: RunSettings, config: Any, *, recompute: bool = True) -> nn.Module:
    """The student as the run will make it, on the meta device: sizes without memory.

    Without `recompute` it keeps all activations, whatever the settings say.
    """
    with torch.device("meta"):
        student = new_model(deepcopy(config))
        if settings.student.dropout == "off":
            switch_dropout_off(student)
        if (again := settings.student.gradient_checkpointing) is not False and recompute:
            recompute_activations(student, selective=again == "selective")
        if settings.student.lora is not None:
            student = add_lora(student, settings.student.lora)
    return student.train()  # type: ignore[no-any-return]


def student_bytes(settings: RunSettings, config: Any, parameters: int) -> float:
    """Bytes of the student's weights: float32, but for those that are packed."""
    return weight_bytes(config, parameters, FLOAT, quantization_of(settings.student))


def _rule_of_thumb(settings: RunSettings, config: Any, tokens: int, trained: int) -> Passes:
    """GPT-2 keeps about 9 H + 5 F floats per token and layer (H hidden, F feed-forward width)."""
    text = config.get_text_config()
    hidden, layers = text.hidden_size, text.num_hidden_layers
    width = getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 4 * hidden
    layer = FLOAT * tokens * (9 * hidden + 5 * width)
    kept = layer + FLOAT * tokens * layers * hidden if settings.student.gradient_checkpointing else layer * layers
    return Passes(kept, max(kept, FLOAT * trained))
