"""Source `dataset`: the responses of the data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from dpkd.api import SourceBase, SourceConfig, SourceSpec, Text, hookimpl


class DatasetConfig(SourceConfig):
    """The responses of the data set."""

    source: Literal["dataset"] = "dataset"

    @property
    def writers(self) -> Mapping[Text, str]:
        return {Text.DATASET: "source"}


SPEC = SourceSpec("dataset", "the data set's own responses", SourceBase, DatasetConfig)


@hookimpl
def dpkd_response_sources() -> list[SourceSpec]:
    return [SPEC]
