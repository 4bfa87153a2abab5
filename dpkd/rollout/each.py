"""Source `each`: several writers, each of whom responds to every prompt (DistiLLM-2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from dpkd.api import Refreshed, SourceBase, SourceConfig, SourceSpec, TeacherGuided, Text, hookimpl


class EachConfig(TeacherGuided, Refreshed, SourceConfig):
    """Responses by several writers to every prompt."""

    source: Literal["each"] = "each"
    each: tuple[Text, ...] = Field((), description="the writers, every one of whom responds to every prompt of a step")

    @property
    def writers(self) -> Mapping[Text, str]:
        return {writer: f"each.{writer}" for writer in self.each}

    @model_validator(mode="after")
    def _several(self) -> EachConfig:
        if len(self.each) < 2 or len(set(self.each)) < len(self.each):
            given = [writer.value for writer in self.each]
            raise ValueError(f"source `each` needs `each`: two or three different writers, got {given}")
        return self


class EachSource(SourceBase):
    """All writers at every step."""

    def _who(self) -> str:
        return f"each of {', '.join(self.config.writers)}, to every prompt"


SPEC = SourceSpec("each", "several writers, each of whom responds to every prompt", EachSource, EachConfig)


@hookimpl
def dpkd_response_sources() -> list[SourceSpec]:
    return [SPEC]
