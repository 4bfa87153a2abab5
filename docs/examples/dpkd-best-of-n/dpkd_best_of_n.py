"""Best of n: of the student's responses to a prompt, train on the one that the teacher finds likeliest."""

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from dpkd.api import Refreshed, Response, SourceBase, SourceConfig, SourceSpec, Text, hookimpl


class BestOfNConfig(Refreshed, SourceConfig):
    """How many responses there are to choose from, and when they are drawn."""

    source: Literal["best-of-n"] = "best-of-n"
    num_generations: int = Field(4, ge=2, description="n: responses drawn for each prompt; one is kept")

    @property
    def writers(self) -> Mapping[Text, str]:
        return {Text.STUDENT: "source"}

    def teacher_uses(self) -> dict[str, str]:
        return {"source": "has the teacher score the student's responses"}


class BestOfN(SourceBase):
    """The response with the largest log-prob per token under the teacher."""

    def draw(self, indices: Sequence[int], period: int) -> list[tuple[Response, ...]]:
        drawn = super().draw(indices, period)
        prompts = [index for index, responses in zip(indices, drawn, strict=True) for _ in responses]
        scored = iter(self.context.score(prompts, [response for responses in drawn for response in responses]))
        return [(max([next(scored) for _ in responses], key=_mean_logp),) for responses in drawn]


def _mean_logp(response: Response) -> float:
    return float(response.teacher_logps.mean())


SPEC = SourceSpec("best-of-n", "the student's response that the teacher finds likeliest", BestOfN, BestOfNConfig)


@hookimpl
def dpkd_response_sources():
    return [SPEC]
