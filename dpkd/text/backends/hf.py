"""The built-in sampler: the model itself draws, in this process (`dpkd.text.sampling`)."""

from __future__ import annotations

from collections.abc import Callable

from dpkd.api import Sampled, SamplerConfig, SamplerSpec, SamplingTask, Writer, hookimpl
from dpkd.text.sampling import sample
from dpkd.text.settings import SamplingSettings

__all__ = ["SPEC", "HfSampler", "dpkd_samplers"]


class HfSampler:
    """Draws with the model that it was opened for: there is nothing to copy and nothing to give back."""

    def __init__(self, writer: Writer, config: SamplerConfig) -> None:
        self._writer = writer

    def refresh(self) -> None:
        """The weights are the model's own."""

    def draw(self, task: SamplingTask, on_finished: Callable[[int, Sampled], None] | None = None) -> list[Sampled]:
        """A response per seed; raises DpkdError as `dpkd.text.sampling.sample` does."""
        writer = self._writer
        settings = SamplingSettings(
            temperature=task.temperature, top_p=task.top_p, top_k=task.top_k, max_new_tokens=task.max_new_tokens,
            batch_size=task.batch_size,
        )  # fmt: skip
        return sample(
            writer.model, task.prompts, settings, eos_ids=writer.eos_ids, pad_id=writer.pad_id, seeds=task.seeds,
            vocabulary=writer.vocabulary, mix_with=task.mix_with, mix=task.mix, veto=task.veto,
            samples_per_prompt=task.samples_per_prompt, longest=writer.context, on_finished=on_finished,
        )  # fmt: skip

    def close(self) -> None:
        """The model is not the sampler's."""


SPEC = SamplerSpec("hf", "the model itself, in this process", open=HfSampler)


@hookimpl
def dpkd_samplers() -> list[SamplerSpec]:
    return [SPEC]
