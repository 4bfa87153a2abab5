"""Source `student`: on-policy responses, new in each refresh period."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from dpkd.api import Refreshed, SourceBase, SourceConfig, SourceSpec, TeacherGuided, Text, hookimpl


class StudentConfig(TeacherGuided, Refreshed, SourceConfig):
    """Responses by the student as it is now."""

    source: Literal["student"] = "student"
    num_generations: int = Field(1, ge=1, description="responses to each prompt, all of them trained on")
    reward: str | None = Field(
        None, description="an installed metric that scores each response, for a loss that reads rewards"
    )

    @property
    def writers(self) -> Mapping[Text, str]:
        return {Text.STUDENT: "source"}


SPEC = SourceSpec("student", "responses by the student, new in each refresh period", SourceBase, StudentConfig)


@hookimpl
def dpkd_response_sources() -> list[SourceSpec]:
    return [SPEC]
