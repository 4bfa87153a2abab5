"""Source `mixed`: one writer per optimizer step, drawn with given probabilities (GKD's λ)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from dpkd.api import Refreshed, SourceBase, SourceConfig, SourceSpec, TeacherGuided, Text, hookimpl


class MixedConfig(TeacherGuided, Refreshed, SourceConfig):
    """One writer per step, drawn from `mix`."""

    source: Literal["mixed"] = "mixed"
    mix: dict[Text, float] = Field(
        default_factory=dict, description="the probability of each writer, drawn once per optimizer step"
    )
    num_generations: int = Field(1, ge=1, description="responses of the student to each prompt, all of them trained on")

    @property
    def writers(self) -> Mapping[Text, str]:
        return {writer: f"mix.{writer}" for writer, share in self.mix.items() if share > 0}

    @model_validator(mode="after")
    def _probabilities(self) -> MixedConfig:
        if not self.mix or abs(sum(self.mix.values()) - 1.0) > 1e-6 or min(self.mix.values()) < 0:
            given = {writer.value: share for writer, share in self.mix.items()}
            raise ValueError(f"source `mixed` needs `mix`: probabilities of the writers that sum to 1, got {given}")
        return self


class MixedSource(SourceBase):
    """The writer of a step follows from run seed and step."""

    def authors(self, step: int) -> tuple[Text, ...]:
        mix = self.config.mix
        return tuple(random.Random(f"mix/{self.context.seed}/{step}").choices(list(mix), weights=list(mix.values())))

    def choices(self) -> list[tuple[Text, ...]]:
        return [(writer,) for writer in self.config.writers]

    def _who(self) -> str:
        return ", ".join(f"{writer} {share:.0%}" for writer, share in self.config.mix.items())


SPEC = SourceSpec("mixed", "one writer per step, drawn with the probabilities of `mix`", MixedSource, MixedConfig)


@hookimpl
def dpkd_response_sources() -> list[SourceSpec]:
    return [SPEC]
