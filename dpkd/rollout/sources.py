"""Who writes the responses of each optimizer step, and when they are written anew.

The data set's responses are there from the start, the teacher's are written once (and kept in a store), the
student's are refreshed as the settings say. Every draw is seeded by (run seed, refresh period, example), so that
neither batching nor the number of processes changes a response.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dpkd.api import Family, Text
from dpkd.data.batch_sampler import BatchSampler
from dpkd.data.encode import Prompt
from dpkd.rollout.adaptive import Adaptive
from dpkd.rollout.response import Response
from dpkd.rollout.settings import TextSettings

# Writes the responses to each of these examples; the number is the refresh period.
StudentGenerator = Callable[[Sequence[int], int], list[tuple[Response, ...]]]
TeacherGenerator = Callable[[Sequence[int]], list[Response]]


class StepResponses(NamedTuple):
    """The responses of one step, and what was left out.

    An entry has all responses to an example: one by each writer (for a pair the chosen first), or several by the
    student.
    """

    responses: list[tuple[int, tuple[Response, ...]]]
    counts: dict[str, float]


def response_seed(seed: int, period: int, example_id: str) -> int:
    """Seed of one response: a hash of run seed, refresh period and example."""
    digest = hashlib.sha256(f"{seed}/{period}/{example_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample_seeds(seed: int, period: int, example_id: str, count: int) -> list[int]:
    """Seeds of the responses to one example: the first is `response_seed`, so that more of them do not change it."""
    first = response_seed(seed, period, example_id)
    return [first, *(response_seed(first, number, "sample") for number in range(1, count))]


def prompt_seed(seed: int, prompt_ids: Sequence[int]) -> int:
    """Seed of the teacher's response to a prompt: the same prompt gets the same response wherever it stands."""
    return response_seed(seed, 0, ",".join(map(str, prompt_ids)))


class Writers:
    """Gives each step its responses, and asks the student and the teacher for new ones when they are due.

    `adaptive` is there where the settings ask for it: then the text of a step is decided when it is prepared.
    """

    def __init__(
        self,
        settings: TextSettings,
        family: Family,
        prompts: Sequence[Prompt],
        schedule: BatchSampler,
        *,
        seed: int,
        eos_ids: frozenset[int],
        student: StudentGenerator,
        teacher: TeacherGenerator,
    ) -> None:
        self.settings, self.family, self.prompts, self.schedule = settings, family, prompts, schedule
        self._seed, self._eos_ids = seed, eos_ids
        self._student, self._teacher = student, teacher
        self.student_responses: dict[int, tuple[Response, ...]] = {}
        self._teacher_responses: dict[int, Response] = {}
        self.adaptive: Adaptive | None = None
        if settings.source == "adaptive" and family is not Family.PAIR:
            self.adaptive = Adaptive(settings.adaptive, seed=seed, steps=schedule.steps)
        self._decided: list[tuple[int, Response]] = []

    def writers(self, step: int) -> tuple[Text, ...]:
        """Who may write at this step: one, for a pair two (chosen first), or all that write or could."""
        if self.family is Family.PAIR:
            pairs = self.settings.pairs
            return Text(pairs.chosen), Text(pairs.rejected)
        if self.adaptive is not None:
            return Text.DATASET, Text.STUDENT
        if self.settings.source == "each":
            return self.settings.each
        if self.settings.source != "mixed":
            return (Text(self.settings.source),)
        drawn = random.Random(f"mix/{self._seed}/{step}").choices(
            list(self.settings.mix), weights=list(self.settings.mix.values())
        )
        return (drawn[0],)

    def prepare_teacher(self) -> None:
        """Have the teacher write all that the run will use."""
        steps = range(self.schedule.steps)
        wanted = dict.fromkeys(i for s in steps if Text.TEACHER in self.writers(s) for i in self.schedule.window(s))
        todo = [i for i in wanted if i not in self._teacher_responses]
        if todo:
            self._teacher_responses.update(zip(todo, self._teacher(todo), strict=True))

    def prepare(self, step: int) -> None:
        """Have the student write what the rest of this step's period will use, if it is not written yet."""
        if self.adaptive is not None:
            self._decided = self._decide(step, self.adaptive)
            return
        if self.schedule.starts_period(step):
            self.student_responses.clear()
        if Text.STUDENT not in self.writers(step):
            return
        if all(i in self.student_responses for i in self.schedule.window(step)):
            return
        todo = [i for i in self._student_examples(step) if i not in self.student_responses]
        if todo:
            written = self._student(todo, self.schedule.period(step))
            self.student_responses.update(zip(todo, written, strict=True))

    def _decide(self, step: int, adaptive: Adaptive) -> list[tuple[int, Response]]:
        window = self.schedule.window(step)
        choice = adaptive.choose(step)
        if choice == "dataset":
            return [(i, response) for i in window for response in self._responses(i, Text.DATASET)]
        if choice == "replay":
            return adaptive.replay(step, len(window))
        drawn = self._student(window, self.schedule.period(step))
        written = [(i, response) for i, (response,) in zip(window, drawn, strict=True)]
        adaptive.add(written)
        return written

    def _texts(self, step: int) -> list[tuple[int, tuple[Response, ...]]]:
        """The responses of a step, before any is left out."""
        if self.adaptive is not None:
            return [(i, (response,)) for i, response in self._decided]
        writers = self.writers(step)
        window = self.schedule.window(step)
        return [(i, tuple(r for writer in writers for r in self._responses(i, writer))) for i in window]

    def _student_examples(self, step: int) -> list[int]:
        period, wanted = self.schedule.period(step), {}
        while step < self.schedule.steps and self.schedule.period(step) == period:
            if Text.STUDENT in self.writers(step):
                wanted.update(dict.fromkeys(self.schedule.window(step)))
            step += 1
        return list(wanted)

    def _responses(self, index: int, writer: Text) -> tuple[Response, ...]:
        """All that a writer has written to an example."""
        if writer is Text.STUDENT:
            return self.student_responses[index]
        if writer is Text.TEACHER:
            return (self._teacher_responses[index],)
        prompt = self.prompts[index]
        return (Response(prompt.response_ids, writer, truncated=prompt.response_ids[-1] not in self._eos_ids),)

    def step(self, step: int) -> StepResponses:
        """The responses of a step. Pairs of equal responses prefer nothing; empty teacher responses teach nothing."""
        counts: dict[str, float] = {"empty_responses": 0, "equal_pairs": 0, "truncated_responses": 0, "responses": 0}
        kept = []
        if self.adaptive is not None:
            counts["student_share"] = self.adaptive.share
        for index, responses in self._texts(step):
            counts["responses"] += len(responses)
            counts["truncated_responses"] += sum(r.truncated for r in responses)
            empty = [r for r in responses if r.is_empty(self._eos_ids)]
            counts["empty_responses"] += len(empty)
            useful = tuple(r for r in responses if r not in empty or r.writer is not Text.TEACHER)
            if self.family is Family.PAIR:
                if len(useful) < 2:
                    continue
                if responses[0].ids == responses[1].ids:
                    counts["equal_pairs"] += 1
                    continue
            if useful:
                kept.append((index, useful))
        return StepResponses(kept, counts)
