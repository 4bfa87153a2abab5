"""Source `pairs`: a chosen and a rejected response to each prompt, by two writers (DPKD: teacher over student)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from dpkd.api import Refreshed, SourceBase, SourceConfig, SourcePlan, SourceSpec, TeacherGuided, Text, hookimpl


class PairsConfig(TeacherGuided, Refreshed, SourceConfig):
    """Pairs of responses by two writers."""

    pairs: ClassVar[bool] = True

    source: Literal["pairs"] = "pairs"
    chosen: Literal["teacher", "dataset", "student"] = Field("teacher", description="who wrote the chosen y_t")
    rejected: Literal["student", "teacher", "dataset"] = Field("student", description="who wrote the rejected y_s")

    @property
    def writers(self) -> Mapping[Text, str]:
        return {Text(self.chosen): "chosen", Text(self.rejected): "rejected"}

    @model_validator(mode="after")
    def _two_writers(self) -> PairsConfig:
        if self.chosen == self.rejected:
            raise ValueError(f"both responses of a pair are written by {self.chosen!r}: there is nothing to prefer")
        return self


class PairsSource(SourceBase):
    """The chosen response first; equal ones are left out."""

    def describe(self) -> SourcePlan:
        plan = super().describe()
        who = [("chosen (y_t)", self.config.chosen), ("rejected (y_s)", self.config.rejected)]
        return SourcePlan([*who, *plan.rows[1:]], plan.longest)


SPEC = SourceSpec("pairs", "a chosen and a rejected response to each prompt, by two writers", PairsSource, PairsConfig)


@hookimpl
def dpkd_response_sources() -> list[SourceSpec]:
    return [SPEC]
