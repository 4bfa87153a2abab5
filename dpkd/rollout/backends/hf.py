"""The built-in sampler: the model itself draws, in this process (`dpkd.rollout.sampling`)."""

from __future__ import annotations

from collections.abc import Callable

from dpkd.api import GenerationModel, Sampled, SamplerConfig, SamplerSpec, SamplingTask, hookimpl
from dpkd.rollout.base import SamplingSettings
from dpkd.rollout.sampling import sample


class HfSampler:
    """Draws with the model that it was opened for: there is nothing to copy and nothing to give back."""

    def __init__(self, writer: GenerationModel, config: SamplerConfig) -> None:
        self._generation_model = writer

    def refresh(self) -> None:
        """The weights are the model's own."""

    def draw(self, task: SamplingTask, on_finished: Callable[[int, Sampled], None] | None = None) -> list[Sampled]:
        """A response per seed; raises DpkdError as `dpkd.rollout.sampling.sample` does."""
        writer = self._generation_model
        settings = SamplingSettings(
            temperature=task.temperature,
            top_p=task.top_p,
            top_k=task.top_k,
            max_new_tokens=task.max_new_tokens,
            batch_size=task.batch_size,
        )
        return sample(
            writer.model,
            task.prompts,
            settings,
            eos_ids=writer.eos_ids,
            pad_id=writer.pad_id,
            seeds=task.seeds,
            vocabulary=writer.vocabulary,
            mix_with=task.mix_with,
            mix=task.mix,
            veto=task.veto,
            num_generations=task.num_generations,
            longest=writer.context,
            on_finished=on_finished,
        )

    def close(self) -> None:
        """The model is not the sampler's."""


SPEC = SamplerSpec("hf", "the model itself, in this process", open=HfSampler)


@hookimpl
def dpkd_samplers() -> list[SamplerSpec]:
    return [SPEC]
