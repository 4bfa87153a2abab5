"""DistiLLM's adaptive off-policy text (2402.03898, §3.2, and its released code): data, fresh student text, or a replay.

The student's text is used with a probability φ, which rises only when the loss on held-out text does. A share of it,
which falls to 0 over the run, is written fresh and kept in a buffer; the rest comes from the buffer, whatever prompts
that belongs to.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from dpkd.rollout.response import Response
from dpkd.rollout.settings import AdaptiveSettings

Choice = Literal["dataset", "fresh", "replay"]


class Adaptive:
    """φ, the held-out loss that it is measured against, and the buffer of the student's newest responses."""

    def __init__(self, settings: AdaptiveSettings, *, seed: int, steps: int) -> None:
        self._settings, self._seed, self._steps = settings, seed, steps
        self.share = settings.share
        self.loss: float | None = None
        self.buffer: deque[tuple[int, Response]] = deque(maxlen=settings.capacity)

    def observe(self, loss: float) -> None:
        """A held-out loss: the first is only noted; one that is worse by the tolerance raises φ and is noted."""
        if self.loss is None:
            self.loss = loss
        elif loss >= self.loss + self._settings.tolerance:
            self.share, self.loss = min(1.0, self.share + self._settings.rise), loss

    def choose(self, step: int) -> Choice:
        """Where the text of a step (0-based) comes from: one draw, seeded by run and step."""
        draw = random.Random(f"adaptive/{self._seed}/{step}").random()
        done = (step + 1) / self._steps
        fresh = {"decreasing": 1 - done, "increasing": done, "constant": 0.5}[self._settings.fresh]
        if draw < fresh * self.share or (draw < self.share and len(self.buffer) < self._settings.capacity):
            return "fresh"
        return "replay" if draw < self.share else "dataset"

    def add(self, written: Iterable[tuple[int, Response]]) -> None:
        """Keep fresh responses, with the number of their example; the oldest leave a full buffer."""
        self.buffer.extend(written)

    def replay(self, step: int, count: int) -> list[tuple[int, Response]]:
        """So many different entries of the buffer (or all of them), seeded by run and step."""
        chance = random.Random(f"replay/{self._seed}/{step}")
        return chance.sample(list(self.buffer), min(count, len(self.buffer)))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON has it."""
        buffer = [[index, response.as_dict()] for index, response in self.buffer]
        return {"share": self.share, "loss": self.loss, "buffer": buffer}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.share, self.loss = state["share"], state["loss"]
        kept: Sequence[Any] = state["buffer"]
        self.buffer = deque(((i, Response.from_dict(row)) for i, row in kept), maxlen=self._settings.capacity)
