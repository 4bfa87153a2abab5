"""The two generators: how the student and the teacher write responses, for all processes together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dpkd.api import Response, Rollout, RolloutLoss, Sampled, Sampler, SamplingSettings, SourceConfig, Text
from dpkd.api.teachers import Teacher, Wants
from dpkd.cross_tokenizer.retokenize import Retokenizer
from dpkd.data.batches import TokenSequence
from dpkd.data.encode import Prompt
from dpkd.errors import DpkdError
from dpkd.models.chunked import chunk_rows
from dpkd.rollout.generator import prompt_seed, sample_seeds, sampling_task
from dpkd.rollout.policy_logps import PolicyScorer, token_scores, truncated
from dpkd.rollout.response_store import ResponseStore
from dpkd.rollout.reward import Reward


@dataclass(frozen=True)
class RankShards:
    """The processes that write together: each takes its share, and all get everything."""

    rank: int = 0
    processes: int = 1
    gather: Callable[[list[Any]], list[Any]] = lambda items: items

    def share(self, items: Sequence[int], work: Callable[[list[int]], list[Any]]) -> list[Any]:
        """`work` on this process's items; the results of all items, in their order."""
        if self.processes == 1:
            return work(list(items))
        mine = list(range(len(items)))[self.rank :: self.processes]
        done = self.gather(list(zip(mine, work([items[i] for i in mine]), strict=True)))
        return [result for _, result in sorted(done, key=lambda pair: pair[0])]


@dataclass
class TeacherScorer:
    """Gives responses the teacher's log-prob of each token."""

    teacher: Teacher
    prompts: Sequence[Prompt]
    pad_id: int
    vocabulary: int
    device: torch.device
    rank_shards: RankShards

    def __call__(self, indices: Sequence[int], responses: Sequence[Response]) -> list[Response]:
        """The responses to these examples, one by one, scored by all processes together."""
        return self.rank_shards.share(
            range(len(responses)), lambda mine: self.scored([indices[i] for i in mine], [responses[i] for i in mine])
        )

    def scored(self, indices: Sequence[int], responses: Sequence[Response]) -> list[Response]:
        """The same by this process alone."""
        sequences = [TokenSequence(self.prompts[i].prompt_ids, r.ids) for i, r in zip(indices, responses, strict=True)]
        wants = Wants(chunk_rows(self.vocabulary, device=self.device), logps=True)
        self.teacher.expect(sequences, wants)
        logps = token_scores(
            lambda batch: self.teacher.score(batch, wants).logps(), sequences, pad_id=self.pad_id, device=self.device
        )
        return [replace(response, teacher_logps=own) for response, own in zip(responses, logps, strict=True)]


@dataclass
class StudentGenerator:
    """Has the student's responses drawn; for a policy gradient the teacher scores them too."""

    sampler: Sampler
    lend: Callable[[Callable[[nn.Module], Any]], Any]  # gives the student, whole, while the sampler draws from it
    prompts: Sequence[Prompt]
    config: SourceConfig
    seed: int
    rank_shards: RankShards
    teacher: nn.Module | None = None  # takes part in the sampling, where the settings say so
    score: TeacherScorer | None = None
    loss: RolloutLoss[Any] | None = None
    policy: PolicyScorer | None = None  # for a policy gradient; None: what draws computes as what trains
    decode: Callable[[Sequence[int]], str] | None = None  # text of a response, for a policy gradient
    reward: Reward | None = None  # of each response, for a policy gradient that reads it

    def __call__(self, indices: Sequence[int], period: int) -> list[tuple[Response, ...]]:
        count = self.config.student_sampling.num_generations
        shared = self.rank_shards.share(indices, lambda mine: _grouped(self._write(mine, period), count))
        if self.loss is None:
            return shared
        drawn = [response for group in shared for response in group]
        prompt = torch.arange(len(indices)).repeat_interleave(count)
        prompts = tuple(self.prompts[i].text for i in indices for _ in range(count))
        texts = tuple(self.decode(response.ids) for response in drawn) if self.decode is not None else ()
        return _grouped(_with_advantages(drawn, self.loss, prompt=prompt, prompts=prompts, responses=texts), count)

    def _write(self, indices: list[int], period: int) -> list[Response]:
        """The responses to these examples, those to one example together."""
        sampled = self.lend(lambda student: self._drawn(student, indices, period))
        if self.loss is None:
            return [Response(s.response_ids, Text.STUDENT, s.truncated) for s in sampled]
        assert self.score is not None  # the plan refuses a rollout loss without a teacher
        drawn = [
            Response(s.response_ids, Text.STUDENT, s.truncated, s.logps.float(), s.behaviour_logps.float())
            for s in sampled
        ]
        asked = [i for i in indices for _ in range(len(drawn) // len(indices))]
        return self._rewarded(asked, self.score.scored(asked, drawn))

    def _rewarded(self, indices: list[int], drawn: list[Response]) -> list[Response]:
        if self.reward is None:
            return drawn
        assert self.decode is not None
        rewards = self.reward(indices, drawn, [self.decode(response.ids) for response in drawn])
        return [replace(response, reward=reward) for response, reward in zip(drawn, rewards, strict=True)]

    def _drawn(self, student: nn.Module, indices: list[int], period: int) -> Sequence[Sampled]:
        how = self.config.student_sampling
        task = sampling_task(
            self.config.sampling,
            [self.prompts[i].prompt_ids for i in indices],
            [s for i in indices for s in sample_seeds(self.seed, period, self.prompts[i].id, how.num_generations)],
            num_generations=how.num_generations,
            logps=self.loss is not None,
            mix_with=self.teacher if how.teacher_mix > 0 or how.teacher_veto > 0 else None,
            mix=how.teacher_mix,
            veto=how.teacher_veto,
        )
        self.sampler.refresh()
        drawn = self.sampler.draw(task)
        if self.loss is None or self.policy is None:
            return drawn
        drawn = self.policy(student, [prompt for prompt in task.prompts for _ in range(how.num_generations)], drawn)
        plain = (task.temperature, task.top_p, task.top_k, task.mix_with) == (1.0, 1.0, 0, None)
        return truncated(drawn) if plain else drawn


def _grouped(responses: list[Response], count: int) -> list[tuple[Response, ...]]:
    return [tuple(responses[first : first + count]) for first in range(0, len(responses), count)]


def _with_advantages(drawn: list[Response], loss: RolloutLoss[Any], **known: Any) -> list[Response]:
    """What each token is worth, over the whole collection at once; `known` is what `Rollout` has of the responses."""

    def column(name: str) -> torch.Tensor:
        return torch.cat([getattr(r, name) for r in drawn])

    rewards = [r.reward for r in drawn if r.reward is not None]

    lengths = torch.tensor([len(r.ids) for r in drawn])
    rollout = Rollout(
        column("rollout_logps"),
        column("behaviour_logps"),
        column("teacher_logps"),
        torch.repeat_interleave(torch.arange(len(drawn)), lengths),
        rewards=torch.tensor(rewards) if len(rewards) == len(drawn) else None,
        **known,
    )
    with torch.no_grad():
        advantages = loss.advantages(rollout).split(lengths.tolist())
    return [replace(r, advantages=a) for r, a in zip(drawn, advantages, strict=True)]


@dataclass
class TeacherGenerator:
    """Gives the teacher's responses: from the store where they are, else drawn and put there."""

    sampler: Callable[[], Sampler] | None  # opens one; None: all that is wanted must be in the store
    prompts: Sequence[Prompt]
    sampling: SamplingSettings
    seed: int
    rank_shards: RankShards
    context: int | None  # the longest sequence that both models read
    store: ResponseStore
    decode: Callable[[Sequence[int]], str]
    progress: Callable[[int, int], None] | None = None

    def __call__(self, indices: Sequence[int]) -> list[Response]:
        self.store.refresh()  # another generator of this run, or another run, may have written some
        # One response per distinct prompt: the store's, so that a run is the same whether it or an earlier one wrote.
        distinct = {self.prompts[i].prompt_ids: i for i in reversed(indices)}
        missing = [i for prompt, i in distinct.items() if self.store.get(prompt) is None]
        if missing and self.sampler is None:
            raise DpkdError(
                f"{len(missing):,} of {len(distinct):,} responses of the teacher are not in the store "
                f"{self.store.folder.parent.parent}: it was written for other data, another seed or other "
                "text.teacher_sampling. Write it with `dpkd cache` under the settings of the run."
            )
        if missing:
            self.rank_shards.share(missing, self._write)
            self.store.refresh()  # what other processes wrote
        return [self._stored(self.prompts[i].prompt_ids) for i in indices]

    def _stored(self, prompt_ids: Sequence[int]) -> Response:
        stored = self.store.get(prompt_ids)
        assert stored is not None  # written just now, if not before
        # The store keeps what the teacher wrote; a student that reads less gets less of it.
        return _cut(stored.response_ids, stored.truncated, self.context, prompt_ids)

    def _write(self, indices: list[int]) -> list[int]:
        """Draw responses and put each into the store as it ends: an interrupted run keeps what was written."""
        prompts = [self.prompts[i].prompt_ids for i in indices]
        done = 0

        def finished(place: int, s: Sampled) -> None:
            nonlocal done
            self.store.add(prompts[place], s.response_ids, s.truncated, self.decode(s.response_ids))
            done += 1
            if self.progress is not None:
                self.progress(done, len(indices))

        assert self.sampler is not None
        sampler = self.sampler()
        try:
            seeds = [prompt_seed(self.seed, prompt) for prompt in prompts]
            sampler.refresh()
            sampler.draw(sampling_task(self.sampling, prompts, seeds, logps=False), finished)
        finally:
            sampler.close()  # it is not needed again: its memory is the student's
        return indices


@dataclass
class RetokenizedResponses:
    """The responses of a teacher with another tokenizer, told again in the student's tokens."""

    generator: TeacherGenerator  # writes in the teacher's tokens, to its own prompts
    retokenizer: Retokenizer
    prompts: Sequence[Prompt]
    context: int | None  # the longest sequence that the student reads

    def __call__(self, indices: Sequence[int]) -> list[Response]:
        written = self.generator(indices)
        told = self.retokenizer.retold([response.ids for response in written])
        return [
            _cut(ids, response.truncated, self.context, self.prompts[i].prompt_ids)
            for i, response, ids in zip(indices, written, told, strict=True)
        ]


def _cut(ids: tuple[int, ...], truncated: bool, context: int | None, prompt_ids: Sequence[int]) -> Response:
    """A response by the teacher, as far as there is room for it behind its prompt."""
    kept = ids if context is None else ids[: context - len(prompt_ids)]
    return Response(kept, Text.TEACHER, truncated or len(kept) < len(ids))
