"""What response sources share: who writes to which example and when, and what is kept for resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dpkd.api.losses import Text
from dpkd.api.sources import Response, SourceContext, SourcePlan, StepResponses, Written


class SourceBase:
    """What sources share. A subclass says who writes (`authors`), or changes what they have written (`draw`).

    The data set's responses are there from the start, the teacher's are written once, the student's anew in each
    refresh period, and kept for resume.

    config   the source's settings
    context  what it is opened with
    """

    def __init__(self, config: Any, context: SourceContext) -> None:
        self.config, self.context = config, context
        self._student: dict[int, tuple[Response, ...]] = {}
        self._teacher: dict[int, Response] = {}

    def authors(self, step: int) -> tuple[Text, ...]:
        """Who writes to each prompt of the step `step`, in this order."""
        return tuple(self.config.writers)

    def choices(self) -> list[tuple[Text, ...]]:
        """All that `authors` may return."""
        return [self.authors(0)]

    def draw(self, indices: Sequence[int], period: int) -> list[tuple[Response, ...]]:
        """New responses by the student to each of the examples `indices`, in the refresh period `period`."""
        return self.context.student(indices, period)

    def from_data(self, index: int) -> tuple[tuple[int, ...], ...]:
        """The data set's responses to the example `index`, in tokens."""
        return (self.context.prompts[index].response_ids,)

    def prepare(self) -> None:
        """Have the teacher write to all prompts that the run will use."""
        batches = self.context.batches
        steps = [step for step in range(batches.steps) if Text.TEACHER in self.authors(step)]
        self._ask_teacher([i for step in steps for i in batches.window(step)])

    def next(self, step: int) -> StepResponses:
        """See `ResponseSource.next`."""
        if self.context.batches.starts_period(step):
            self._student.clear()
        authors, window = self.authors(step), self.context.batches.window(step)
        if Text.STUDENT in authors and not self._student.keys() >= set(window):
            self._renew(step)
        return self._step(self._by(authors, window))

    def fixed(self, indices: Sequence[int]) -> Written:
        """See `ResponseSource.fixed`."""
        authors = [writer for writer in self.config.writers if writer is not Text.STUDENT]
        if Text.TEACHER in authors:
            self._ask_teacher(indices)
        return self._by(authors, indices)

    def observe(self, loss: float) -> None:
        """Nothing follows from the `loss` on held-out rows."""

    def state(self) -> dict[str, Any]:
        """The student's responses of this period."""
        rows = [[index, [r.as_dict() for r in responses]] for index, responses in self._student.items()]
        return {"responses": rows}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self._student = {index: tuple(map(Response.from_dict, rows)) for index, rows in state["responses"]}

    def describe(self) -> SourcePlan:
        """See `ResponseSource.describe`."""
        return SourcePlan([("responses by", self._who()), *self._student_rows(), *self._teacher_rows()], self._longest)

    def _who(self) -> str:
        return ", ".join(self.config.writers)

    def _by(self, authors: Sequence[Text], indices: Sequence[int]) -> Written:
        return [(i, tuple(r for author in authors for r in self._responses(i, author))) for i in indices]

    def _responses(self, index: int, writer: Text) -> tuple[Response, ...]:
        if writer is Text.STUDENT:
            return self._student[index]
        if writer is Text.TEACHER:
            return (self._teacher[index],)
        own = self.from_data(index)
        return tuple(Response(ids, writer, truncated=ids[-1] not in self.context.eos_ids) for ids in own)

    def _ask_teacher(self, indices: Sequence[int]) -> None:
        todo = [i for i in dict.fromkeys(indices) if i not in self._teacher]
        if todo:
            self._teacher.update(zip(todo, self.context.teacher(todo), strict=True))

    def _renew(self, step: int) -> None:
        """Have the student write to all prompts of the rest of the period."""
        batches, period = self.context.batches, self.context.batches.period(step)
        wanted: dict[int, None] = {}
        while step < batches.steps and batches.period(step) == period:
            if Text.STUDENT in self.authors(step):
                wanted.update(dict.fromkeys(batches.window(step)))
            step += 1
        todo = [i for i in wanted if i not in self._student]
        self._student.update(zip(todo, self.draw(todo, period), strict=True))

    def _step(self, written: Written) -> StepResponses:
        return useful(written, self.context.eos_ids, pairs=self.config.pairs)

    def _longest(self, index: int) -> tuple[tuple[Text, int], ...]:
        found = [tuple(one for writer in choice for one in self._bounds(index, writer)) for choice in self.choices()]
        return max(found, key=lambda responses: sum(length for _, length in responses))

    def _bounds(self, index: int, writer: Text) -> tuple[tuple[Text, int], ...]:
        """The greatest lengths of a writer's responses to an example."""
        config, context = self.config, self.context
        if writer is Text.DATASET:
            return tuple((writer, len(ids)) for ids in self.from_data(index))
        sampling = config.teacher_sampling if writer is Text.TEACHER else config.sampling
        limit = sampling.max_new_tokens
        if context.max_length is not None:
            limit = max(1, min(limit, context.max_length - len(context.prompts[index].prompt_ids)))
        return ((writer, limit),) * (config.student_sampling.num_generations if writer is Text.STUDENT else 1)

    def _student_rows(self) -> list[tuple[str, str]]:
        if Text.STUDENT not in self.config.writers:
            return []
        batches, how, limit = self.context.batches, self.config.student_sampling, self.config.sampling.max_new_tokens
        periods: dict[int, set[int]] = {}
        for step in range(batches.steps):
            periods.setdefault(batches.period(step), set()).update(batches.window(step))
        drawn = how.num_generations * sum(map(len, periods.values()))
        what = f"{how.refresh}: {drawn:,} responses in {len(periods):,} collections, up to {limit} tokens each"
        rows = [("student writes", what)]
        if how.teacher_veto:
            rows.append(("replaced", f"tokens not among the teacher's {how.teacher_veto} likeliest, by its own draw"))
        if how.reward:
            rows.append(("reward", f"{how.reward} of each response"))
        if how.teacher_mix:
            rows.append(("drawn from", f"{how.teacher_mix:g} · teacher + {1 - how.teacher_mix:g} · student"))
        return rows

    def _teacher_rows(self) -> list[tuple[str, str]]:
        config, batches = self.config, self.context.batches
        rows = []
        if config.backend != "hf" and config.draws:
            rows.append(("drawn by", config.backend))
        if Text.TEACHER in config.writers:
            used = len({i for step in range(batches.steps) for i in batches.window(step)})
            limit = config.teacher_sampling.max_new_tokens
            rows.append(("teacher writes", f"{used:,} responses of at most {limit} tokens, less those in the store"))
        return rows


def useful(written: Written, eos_ids: frozenset[int], *, pairs: bool) -> StepResponses:
    """The responses of a step without those that teach nothing, and counts.

    Pairs of equal responses prefer nothing; empty teacher responses teach nothing.
    """
    counts: dict[str, float] = {"empty_responses": 0, "equal_pairs": 0, "truncated_responses": 0, "responses": 0}
    kept: Written = []
    for index, responses in written:
        counts["responses"] += len(responses)
        counts["truncated_responses"] += sum(r.truncated for r in responses)
        empty = [r for r in responses if r.is_empty(eos_ids)]
        counts["empty_responses"] += len(empty)
        own = tuple(r for r in responses if r not in empty or r.writer is not Text.TEACHER)
        if pairs and len(own) < 2:
            continue
        if pairs and responses[0].ids == responses[1].ids:
            counts["equal_pairs"] += 1
            continue
        if own:
            kept.append((index, own))
    gaps = [
        (r.rollout_logps - r.behaviour_logps).abs()
        for _, responses in written
        for r in responses
        if r.rollout_logps is not None and r.behaviour_logps is not None
    ]
    rewards = [r.reward for _, responses in written for r in responses if r.reward is not None]
    if rewards:
        counts["reward"] = sum(rewards) / len(rewards)
    return StepResponses(kept, {**counts, "policy_gap": float(torch.cat(gaps).mean())} if gaps else counts)
