"""A stand-in for vLLM's documented interface, as far as dpkd uses it; anything else is refused.

It is copied to `vllm.py` by tests. Slow and plain: a whole forward pass for each token, in float32.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

ENGINES: list[LLM] = []
# Found as a module, and no package: `vllm.platforms` is put beside it.
sys.modules["vllm.platforms"] = SimpleNamespace(  # type: ignore[assignment]
    current_platform=SimpleNamespace(is_cpu=lambda: False, is_sleep_mode_available=lambda: True)
)


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = 16
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    logprobs: int | None = None
    detokenize: bool = True


class _Engine(torch.nn.Module):
    """The model inside the engine."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model


class LLM:
    def __init__(
        self,
        model,
        *,
        load_format,
        skip_tokenizer_init,
        dtype,
        max_model_len,
        max_num_batched_tokens,
        gpu_memory_utilization,
        enforce_eager,
        enable_sleep_mode,
        enable_prefix_caching,
        logprobs_mode,
        seed,
    ):
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert (load_format, skip_tokenizer_init, logprobs_mode) == ("dummy", True, "processed_logprobs")
        assert 0 < gpu_memory_utilization < 1
        assert max_num_batched_tokens >= (max_model_len or 0)
        self.config = AutoConfig.from_pretrained(model)
        assert self.config.architectures, "vLLM takes a model without a class for an embedder"
        core = SimpleNamespace(shutdown=lambda: None)
        core.model_executor = core.scheduler = core
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(engine_core=core))
        with torch.random.fork_rng():
            self._engine = _Engine(AutoModelForCausalLM.from_config(self.config, dtype=torch.float32).eval())
        self.max_model_len, self.can_sleep = max_model_len, enable_sleep_mode
        self.awake, self.log = {"weights", "kv_cache"}, []
        ENGINES.append(self)

    def sleep(self, level=1):
        assert self.can_sleep
        assert level == 2
        self.awake = set()
        for parameter in self._engine.model.parameters():
            parameter.data.fill_(torch.nan)
        self.log.append("sleep")

    def wake_up(self, tags=None):
        assert self.can_sleep
        self.awake |= set(tags or ("weights", "kv_cache"))
        self.log.append(f"wake {tags}")

    def apply_model(self, func):
        assert "weights" in self.awake
        return [func(self._engine)]

    @torch.no_grad()
    def collective_rpc(self, method, kwargs):
        assert "weights" in self.awake
        assert method == "reload_weights"
        self.log.append("weights")
        own = dict(self._engine.model.named_parameters())
        for name, weight in kwargs["weights_iterator"]:
            own[name].copy_(weight)
        return [None]

    def reset_prefix_cache(self):
        self.log.append("reset")

    def generate(self, prompts, sampling_params, *, use_tqdm=True):
        assert self.awake == {"weights", "kv_cache"}
        assert len(prompts) == len(sampling_params)
        self.log.append(f"generate {len(prompts)}")
        pairs = zip(prompts, sampling_params, strict=True)
        return [SimpleNamespace(outputs=[self._write(one["prompt_token_ids"], p)]) for one, p in pairs]

    @torch.no_grad()
    def _write(self, prompt, params):
        assert (params.n, params.detokenize, params.ignore_eos) == (1, False, True)
        generator = torch.Generator().manual_seed(params.seed)
        ids, logprobs = [], []
        while len(ids) < params.max_tokens and len(prompt) + len(ids) < (self.max_model_len or 10**9):
            logits = self._engine.model(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, -1].double()
            log_p = (logits / (params.temperature or 1.0)).log_softmax(-1)
            greedy = params.temperature == 0
            token = log_p.argmax() if greedy else torch.multinomial(log_p.exp(), 1, generator=generator)
            ids.append(int(token))
            logprobs.append({ids[-1]: SimpleNamespace(logprob=float(log_p[ids[-1]]), rank=1)})
            if ids[-1] in params.stop_token_ids:
                return SimpleNamespace(
                    token_ids=ids, finish_reason="stop", logprobs=None if params.logprobs is None else logprobs
                )
        return SimpleNamespace(
            token_ids=ids, finish_reason="length", logprobs=None if params.logprobs is None else logprobs
        )
