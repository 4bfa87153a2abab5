"""Source `teacher`: one response by the teacher to each prompt, drawn once and kept in a store (sequence-level KD)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from dpkd.api import SourceBase, SourceConfig, SourceSpec, Text, hookimpl


class TeacherConfig(SourceConfig):
    """Responses by the teacher, drawn once."""

    source: Literal["teacher"] = "teacher"

    @property
    def writers(self) -> Mapping[Text, str]:
        return {Text.TEACHER: "source"}


SPEC = SourceSpec("teacher", "a response by the teacher to each prompt, drawn once", SourceBase, TeacherConfig)


@hookimpl
def dpkd_response_sources() -> list[SourceSpec]:
    return [SPEC]
