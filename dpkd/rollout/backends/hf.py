"""The built-in sampler: the model itself draws, in this process (`dpkd.rollout.sampling`)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from dpkd.api import GenerationModel, Sampled, SamplerConfig, SamplerSpec, SamplingSettings, SamplingTask, hookimpl
from dpkd.models.head import causal_lm
from dpkd.models.sharding import is_sharded
from dpkd.rollout.sampling import Decoder

LOG = logging.getLogger(__name__)
# Caches and graphs stay between two calls where they take at most this share of the device's memory.
KEPT_SHARE = 0.1


class LowPrecisionCopy:
    """A model in bfloat16, whose weights follow those of the original."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # Given to deepcopy as known, parameters are neither copied in full nor with their gradients, and stay tied.
        known: dict[int, Any] = {id(p): nn.Parameter(_narrow(p), requires_grad=False) for p in model.parameters()}
        self.model: nn.Module = deepcopy(model, known).eval()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights in place: whoever recorded where they are finds the new ones there."""
        for own, other in zip(self.model.parameters(), self._model.parameters(), strict=True):
            own.copy_(other, non_blocking=True)
        for kept, given in zip(self.model.buffers(), self._model.buffers(), strict=True):
            kept.copy_(given, non_blocking=True)


def _narrow(parameter: torch.Tensor) -> torch.Tensor:
    copied = parameter.detach().clone()
    return copied.to(torch.bfloat16) if copied.is_floating_point() else copied


def copy_pays(model: nn.Module, device: torch.device) -> bool:
    """Whether a bfloat16 copy draws faster: on a GPU that has the type, of plain float32 weights."""
    if device.type != "cuda" or not torch.cuda.is_bf16_supported():
        return False
    return all(type(p) is nn.Parameter and p.dtype == torch.float32 for p in model.parameters())


class HfSampler:
    """Draws with the model that it was opened for; float32 weights on a GPU are drawn from as a bfloat16 copy."""

    def __init__(self, writer: GenerationModel, config: SamplerConfig) -> None:
        self._generation_model = writer
        self._device: torch.device = causal_lm(writer.model).get_input_embeddings().weight.device
        whole = not is_sharded(writer.model)
        self._copies = whole and writer.decoding != "eager" and copy_pays(writer.model, self._device)
        self._copy: LowPrecisionCopy | None = None
        self._decoder: Decoder | None = None

    def refresh(self) -> None:
        """Take over the weights that the model has now."""
        if self._copy is not None:
            self._copy.refresh()

    def draw(self, task: SamplingTask, on_finished: Callable[[int, Sampled], None] | None = None) -> list[Sampled]:
        """A response per seed; raises DpkdError as `dpkd.rollout.sampling.sample` does."""
        settings = SamplingSettings(**{name: getattr(task, name) for name in SamplingSettings.model_fields})
        decoder = self._open()
        drawn = decoder.draw(
            task.prompts,
            settings,
            seeds=task.seeds,
            mix_with=task.mix_with,
            mix=task.mix,
            veto=task.veto,
            num_generations=task.num_generations,
            longest=self._generation_model.context,
            on_finished=on_finished,
        )
        if self._device.type == "cuda":
            total = torch.cuda.get_device_properties(self._device).total_memory
            if decoder.bytes > KEPT_SHARE * total:
                decoder.release()
        return drawn

    def _open(self) -> Decoder:
        """The decoder, made at the first call: a sharded model is whole only then."""
        if self._decoder is None:
            writer = self._generation_model
            if self._copies:
                try:
                    self._copy = LowPrecisionCopy(writer.model)
                except Exception as reason:  # an optimization that fails must not end a run
                    LOG.warning("drawing from the float32 weights themselves: no bfloat16 copy (%s)", reason)
            self._decoder = Decoder(
                writer.model if self._copy is None else self._copy.model,
                eos_ids=writer.eos_ids,
                pad_id=writer.pad_id,
                vocabulary=writer.vocabulary,
                decoding="eager" if is_sharded(writer.model) else writer.decoding,
            )
        return self._decoder

    def close(self) -> None:
        """Give back the copy, the caches and the graphs; the model is not the sampler's."""
        self._decoder = self._copy = None


SPEC = SamplerSpec("hf", "the model itself, in this process", open=HfSampler)


@hookimpl
def dpkd_samplers() -> list[SamplerSpec]:
    return [SPEC]
