"""vLLM as a sampler: an engine in this process, beside the model, that gets the model's weights before it draws.

Written after vLLM's documentation and tested against a stand-in for it. It has never run on a GPU in this project:
try it on a short run first.

The engine starts with weights of its own making (`load_format="dummy"`) from the model's configuration alone, so that
every student can be drawn from: one made of its teacher's layers, one with adapters, one that no folder holds. Its
worker stays in this process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`, which also makes its schedule deterministic), so
`LLM.apply_model` hands weights over without a copy through the host. Documentation: https://docs.vllm.ai
(Offline inference, Sleep mode, Reproducibility, Engine arguments).
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, Literal

import torch

from dpkd.api import Ability, GenerationModel, Sampled, SamplerConfig, SamplerSpec, SamplingTask, hookimpl, setting
from dpkd.errors import DpkdError
from dpkd.models.head import causal_lm
from dpkd.models.lora import merged
from dpkd.rollout.kv_cache import longest_sequence
from dpkd.rollout.sampling import room

# Batches that go to the engine in one call: what it has drawn is known when the call returns.
BATCHES_PER_CALL = 16


class VllmConfig(SamplerConfig):
    """Settings of the engine."""

    gpu_memory: float = setting(
        0.3, description="share of the GPU's memory that the engine may take", source="TRL's GRPOConfig", gt=0, lt=1
    )
    dtype: Literal["bfloat16", "float16", "float32"] = setting(
        "bfloat16", description="type of the engine's weights", source="what vLLM's kernels are made for"
    )
    sleep: bool = setting(
        True, description="the engine gives its memory back while the student trains", source="TRL's colocate mode"
    )
    eager: bool = setting(
        False, description="no CUDA graphs: slower, a faster start, less memory", source="vLLM's enforce_eager"
    )


class VllmSampler:
    """An engine for one model."""

    def __init__(self, writer: GenerationModel, config: VllmConfig) -> None:
        """Raises DpkdError when vLLM is not installed."""
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # vLLM reads it when the engine is made
        try:
            import vllm
        except ImportError as error:
            raise DpkdError(f"text.backend: vllm cannot be used here: {_missing() or error}") from error
        self._generation_model, self._config, self._params = writer, config, vllm.SamplingParams
        lm = causal_lm(writer.model)
        limits = (writer.context, longest_sequence(writer.model))
        self._longest = min((limit for limit in limits if limit), default=None)
        size = lm.config.get_text_config().vocab_size
        cut = writer.vocabulary is not None and writer.vocabulary < size
        self._allowed = list(range(writer.vocabulary or size)) if cut else None
        with tempfile.TemporaryDirectory(prefix="dpkd-vllm-") as folder:
            lm.config.save_pretrained(folder)
            self._engine: Any = vllm.LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype=config.dtype,
                max_model_len=self._longest,
                gpu_memory_utilization=config.gpu_memory,
                enforce_eager=config.eager,
                enable_sleep_mode=config.sleep,
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",
                seed=0,
            )
        self._has_weights = False
        if config.sleep:
            self._engine.sleep(level=2)

    def refresh(self) -> None:
        """Copy the weights into the engine, adapters merged, and forget the caches of prompts under the old ones."""
        if self._config.sleep and not self._has_weights:
            self._engine.wake_up(tags=["weights"])
        model: Any = self._generation_model.model
        plain = merged(model) if hasattr(model, "peft_config") else model
        weights = [(name, parameter.detach()) for name, parameter in plain.named_parameters()]
        self._engine.apply_model(lambda own: own.load_weights(iter(weights)))
        self._engine.reset_prefix_cache()
        self._has_weights = True

    def draw(self, task: SamplingTask, on_finished: Callable[[int, Sampled], None] | None = None) -> list[Sampled]:
        """A response per seed; raises DpkdError when a prompt leaves no room, or when log-probs are not numbers."""
        if task.mix_with is not None:
            raise DpkdError(f"text.backend: vllm has no teacher mix: {LACKS[Ability.TEACHER_MIX]}")
        requests = list(self._requests(task))
        if not self._has_weights:
            self.refresh()
        if self._config.sleep:
            self._engine.wake_up(tags=["kv_cache"])
        drawn: list[Sampled] = []
        size = task.batch_size * BATCHES_PER_CALL
        for start in range(0, len(requests), size):
            prompts, parameters = zip(*requests[start : start + size], strict=True)
            for output in self._engine.generate(list(prompts), list(parameters), use_tqdm=False):
                drawn.append(self._sampled(output.outputs[0], task))
                if on_finished is not None:
                    on_finished(len(drawn) - 1, drawn[-1])
        if self._config.sleep:
            self._engine.sleep(level=2)  # weights and caches are dropped: the next draw takes them over again
            self._has_weights = False
        return drawn

    def _requests(self, task: SamplingTask) -> Iterator[tuple[dict[str, list[int]], Any]]:
        """A prompt and its parameters for each seed; the engine's prefix cache reads a prompt once."""
        stops = sorted(self._generation_model.eos_ids)
        for place, seed in enumerate(task.seeds):
            number = place // task.num_generations
            prompt = list(task.prompts[number])
            yield (
                {"prompt_token_ids": prompt},
                self._params(
                    n=1,
                    temperature=task.temperature,
                    top_p=task.top_p,
                    top_k=task.top_k,
                    seed=seed,
                    max_tokens=room(number, len(prompt), self._longest, task.max_new_tokens),
                    stop_token_ids=stops,
                    ignore_eos=True,
                    logprobs=0 if task.logps else None,
                    allowed_token_ids=self._allowed,
                    detokenize=False,
                ),
            )

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

    def close(self) -> None:
        """Drop the engine and its memory."""
        self._engine = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


LACKS = {
    Ability.TEACHER_MIX: "its engine holds one model",
    Ability.FILTERED_LOGPS: "it reports log-probs of one policy, which are the model's own under plain sampling only",
    Ability.QUANTIZED: "what bitsandbytes has packed cannot be handed to its engine",
    Ability.SEVERAL_PROCESSES: "the engines of several processes are not started together",
}


def _missing() -> str | None:
    if find_spec("vllm") is None:
        return "the package vllm is not installed: pip install 'dpkd[vllm]' on a machine with a GPU"
    return None


SPEC = SamplerSpec(
    "vllm",
    "vLLM, an engine beside the model (never run on a GPU in this project)",
    open=VllmSampler,
    config=VllmConfig,
    lacks=LACKS,
    missing=_missing,
)


@hookimpl
def dpkd_samplers() -> list[SamplerSpec]:
    return [SPEC]
