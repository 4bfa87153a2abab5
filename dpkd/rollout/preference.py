"""Source `preference`: the chosen and rejected responses of a preference data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from dpkd.api import SourceBase, SourceConfig, SourceSpec, Text, hookimpl


class PreferenceConfig(SourceConfig):
    """Pairs from rows that hold `chosen` and `rejected`."""

    pairs: ClassVar[bool] = True
    preferences: ClassVar[bool] = True

    source: Literal["preference"] = "preference"

    @property
    def writers(self) -> Mapping[Text, str]:
        return {Text.DATASET: "source"}


class PreferenceSource(SourceBase):
    """Both responses are the data set's."""

    def from_data(self, index: int) -> tuple[tuple[int, ...], ...]:
        prompt = self.context.prompts[index]
        return prompt.response_ids, prompt.rejected_ids

    def _who(self) -> str:
        return "dataset: chosen and rejected of each row"


SPEC = SourceSpec("preference", "pairs of a preference data set: chosen, rejected", PreferenceSource, PreferenceConfig)


@hookimpl
def dpkd_response_sources() -> list[SourceSpec]:
    return [SPEC]
