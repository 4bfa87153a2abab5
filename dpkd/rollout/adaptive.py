"""Source `adaptive`: DistiLLM's adaptive off-policy text (2402.03898, §3.2, and its released code).

The student's text is used with a probability φ, which rises only when the loss on held-out text does. A share of it,
which falls to 0 over the run, is drawn fresh and kept in a buffer; the rest comes from the buffer, whatever prompts
that belongs to.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from dpkd.api import (
    Response,
    SourceBase,
    SourceConfig,
    SourceContext,
    SourcePlan,
    SourceSpec,
    StepResponses,
    TeacherGuided,
    Text,
    Written,
    hookimpl,
)

Choice = Literal["dataset", "fresh", "replay"]


class AdaptiveConfig(TeacherGuided, SourceConfig):
    """When the student's text takes the place of the data set's."""

    follows_dev: ClassVar[bool] = True

    source: Literal["adaptive"] = "adaptive"
    share: float = Field(0.0, ge=0, le=1, description="φ at the start: probability of student text at a step")
    rise: float = Field(0.1, gt=0, le=1, description="what φ rises by when the loss on the rows of `dev` does")
    tolerance: float = Field(
        0.1, ge=0, description="ε: how much higher (nats per token) that loss must be than when φ last rose"
    )
    capacity: int = Field(1000, ge=1, description="responses in the replay buffer; while it is not full, all are fresh")
    fresh: Literal["decreasing", "constant", "increasing"] = Field(
        "decreasing", description="share of the student's text that is fresh: from 1 to 0 over the run, ½, or 0 to 1"
    )

    @property
    def writers(self) -> Mapping[Text, str]:
        return {Text.DATASET: "source", Text.STUDENT: "source"}


class AdaptiveSource(SourceBase):
    """φ, the held-out loss that it is measured against, and the buffer of the student's newest responses."""

    def __init__(self, config: AdaptiveConfig, context: SourceContext) -> None:
        super().__init__(config, context)
        self.share = config.share
        self.loss: float | None = None
        self.buffer: deque[tuple[int, Response]] = deque(maxlen=config.capacity)

    def choices(self) -> list[tuple[Text, ...]]:
        return [(Text.DATASET,), (Text.STUDENT,)]

    def next(self, step: int) -> StepResponses:
        responses, counts = self._step(self._chosen(step))
        return StepResponses(responses, {**counts, "student_share": self.share})

    def observe(self, loss: float) -> None:
        """The first loss is only noted; one that is worse by the tolerance raises φ and is noted."""
        if self.loss is None:
            self.loss = loss
        elif loss >= self.loss + self.config.tolerance:
            self.share, self.loss = min(1.0, self.share + self.config.rise), loss

    def choose(self, step: int) -> Choice:
        """Where the text of a step (0-based) comes from: one draw, seeded by run and step."""
        draw = random.Random(f"adaptive/{self.context.seed}/{step}").random()
        done = (step + 1) / self.context.batches.steps
        fresh = {"decreasing": 1 - done, "increasing": done, "constant": 0.5}[self.config.fresh]
        if draw < fresh * self.share or (draw < self.share and len(self.buffer) < self.config.capacity):
            return "fresh"
        return "replay" if draw < self.share else "dataset"

    def add(self, written: Iterable[tuple[int, Response]]) -> None:
        """Keep fresh responses, with the number of their example; the oldest leave a full buffer."""
        self.buffer.extend(written)

    def replay(self, step: int, count: int) -> list[tuple[int, Response]]:
        """So many different entries of the buffer (or all of them), seeded by run and step."""
        chance = random.Random(f"replay/{self.context.seed}/{step}")
        return chance.sample(list(self.buffer), min(count, len(self.buffer)))

    def _chosen(self, step: int) -> Written:
        window, choice = self.context.batches.window(step), self.choose(step)
        if choice == "dataset":
            return self._by([Text.DATASET], window)
        if choice == "replay":
            return [(i, (response,)) for i, response in self.replay(step, len(window))]
        drawn = self.draw(window, self.context.batches.period(step))
        written = list(zip(window, drawn, strict=True))
        self.add((i, response) for i, responses in written for response in responses)
        return written

    def describe(self) -> SourcePlan:
        config = self.config
        who = (
            f"data set; student with a probability of {config.share:g} at first, more when dev rises by "
            f"{config.tolerance:g} nats; a replay of {config.capacity:,}"
        )
        return SourcePlan([("responses by", who)], self._longest)

    def state(self) -> dict[str, Any]:
        """φ, what it is measured against, and the buffer."""
        buffer = [[index, response.as_dict()] for index, response in self.buffer]
        return {"share": self.share, "loss": self.loss, "buffer": buffer}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.share, self.loss = state["share"], state["loss"]
        self.buffer = deque(((i, Response.from_dict(row)) for i, row in state["buffer"]), maxlen=self.config.capacity)


SPEC = SourceSpec(
    "adaptive", "data set or student, by the loss on held-out rows, with a replay", AdaptiveSource, AdaptiveConfig
)


@hookimpl
def dpkd_response_sources() -> list[SourceSpec]:
    return [SPEC]
