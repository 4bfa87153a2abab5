"""Opens the response sources of a run, and groups the losses that share the responses of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dpkd.api import (
    Ability,
    Family,
    GenerationModel,
    MetricSpec,
    ResponseSource,
    RolloutLoss,
    Sampler,
    SamplerSpec,
    SourceConfig,
    SourceContext,
    Text,
)
from dpkd.api.generators import Decoding
from dpkd.api.teachers import Teacher, TeacherText
from dpkd.config.objective import Objective
from dpkd.config.resolve import Resolved
from dpkd.data.batch_sampler import BatchSampler
from dpkd.data.encode import Prompt
from dpkd.data.encoding import end_ids
from dpkd.errors import DpkdError
from dpkd.models.tokenizers import tokenizer_fingerprint
from dpkd.plugins import Registry
from dpkd.rollout.generator import open_sampler
from dpkd.rollout.policy_logps import PolicyScorer
from dpkd.rollout.response_generators import (
    RankShards,
    RetokenizedResponses,
    StudentGenerator,
    TeacherGenerator,
    TeacherScorer,
)
from dpkd.rollout.response_store import ResponseStore, default_folder
from dpkd.rollout.reward import Reward
from dpkd.train.prepare import RunData
from dpkd.train.progress import Display
from dpkd.train.step_batches import LossGroup

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_groups(resolved: Resolved, losses: Mapping[str, Any], rollouts: Rollouts) -> list[LossGroup]:
    """The losses by the text that they share: the main one with all that take its responses, then the others."""
    main, *extras = resolved.objectives
    sharing = [main, *(extra for extra in extras if extra.shares_text)]
    groups = []
    for members in ([*sharing], *([extra] for extra in extras if not extra.shares_text)):
        first = members[0]
        loss = losses[first.name] if first.spec.family is Family.ROLLOUT else None
        groups.append(
            LossGroup(
                first.name,
                rollouts.open(first, loss),
                {member.name: (member.reads, member.weight) for member in members},
                rollouts.run_data.retokenizer,
            )
        )
    return groups


def check_processes(resolved: Resolved, processes: int) -> None:
    """Raises DpkdError when a sampler cannot work in several processes, and there are several."""
    for text in (objective.text for objective in resolved.objectives):
        if processes == 1 or not text.draws:
            continue
        reason = resolved.registry.get(SamplerSpec, text.backend).spec.lacks.get(Ability.SEVERAL_PROCESSES)
        if reason is not None:
            raise DpkdError(
                f"text.backend: {text.backend} works in one process only, and there are {processes}: {reason}. "
                "Start one process, or set text.backend=hf."
            )


def open_source(
    objective: Objective, resolved: Resolved, run_data: RunData, *, model: nn.Module | None = None, **generators: Any
) -> ResponseSource:
    """The source of the responses of a loss; without `generators` (see `SourceContext`) it can be described.

    What ends a response is the tokenizer's EOS, and what the generation config of the student, `model`, adds.
    """
    settings, data = resolved.settings, run_data.data
    how = objective.text.student_sampling
    batches = BatchSampler(
        [len(p.prompt_ids) + len(p.response_ids) for p in data.prompts],
        batch_size=settings.train.batch_size,
        steps=run_data.steps,
        seed=settings.seed,
        refresh=how.refresh,
        every=how.every,
        num_iterations=how.num_iterations,
    )
    context = SourceContext(
        data.prompts, batches, settings.seed, end_ids(run_data.tokenizer, model), run_data.context, **generators
    )
    return objective.source.open(objective.text, context)


def teacher_generator(
    text: SourceConfig,
    own: TeacherText,
    prompts: Sequence[Prompt],
    *,
    registry: Registry,
    tokenizer: Any,
    context: int | None,
    seed: int,
    rank_shards: RankShards,
    progress: Callable[[int, int], None],
) -> TeacherGenerator:
    """What gives the teacher's responses to these prompts: from the store that has them, else drawn by its model.

    `tokenizer` is the teacher's, `context` the longest sequence that both models read.
    """
    model, key = None, text.backend_key
    backend, backend_settings = text.backend, text.backend_settings
    if registry.get(SamplerSpec, backend).spec.student_only:
        backend, backend_settings, key = "hf", {}, None
    if own.model is not None:
        longest = longest_asked(prompts, text.teacher_sampling.max_new_tokens)
        model = generation_model(own.model, own.vocabulary, tokenizer, None, text.decoding, longest)
    store = ResponseStore.open(
        own.folder or (Path(text.store) if text.store else default_folder()),
        model_fingerprint=own.fingerprint,
        # Which ids may be drawn decides the responses too.
        tokenizer_fingerprint=f"{tokenizer_fingerprint(tokenizer)}/{own.vocabulary}",
        sampling=text.teacher_sampling,
        seed=seed,
        backend=key if own.sampler is None else {"name": "server"},
    )
    sampler = own.sampler
    if model is not None:
        sampler = lambda: open_sampler(registry, backend, backend_settings, model)  # noqa: E731
    return TeacherGenerator(
        sampler,
        prompts,
        text.teacher_sampling,
        seed,
        rank_shards,
        context,
        store,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        progress,
    )


def generation_model(
    model: nn.Module, vocabulary: int, tokenizer: Any, context: int | None, decoding: Decoding, longest: int
) -> GenerationModel:
    """A model that a sampler is opened for."""
    ends = end_ids(tokenizer, model)
    return GenerationModel(model, vocabulary, ends, tokenizer.pad_token_id, context, decoding, longest)


def longest_asked(prompts: Sequence[Prompt], new_tokens: int) -> int:
    """Tokens of the longest prompt with a response to it."""
    return max((len(prompt.prompt_ids) for prompt in prompts), default=0) + new_tokens


@dataclass(kw_only=True)
class Rollouts:
    """The models of a run and all else that writing takes; opens the source of each group of losses."""

    resolved: Resolved
    student: nn.Module
    lend: Callable[[Callable[[nn.Module], Any]], Any]  # the student with whole weights, for the time of a call
    teacher: Teacher | None
    vocabulary: int
    run_data: RunData
    accelerator: Accelerator
    display: Display
    _samplers: list[tuple[tuple[Any, ...], Sampler]] = field(default_factory=list)

    def close(self) -> None:
        """Give back what the samplers of the student hold."""
        while self._samplers:
            self._samplers.pop()[1].close()

    def open(self, objective: Objective, rollout_loss: RolloutLoss[Any] | None) -> ResponseSource:
        """The source of the responses of a loss."""
        text, generators = objective.text, dict[str, Any]()
        if self.teacher is not None and self.run_data.retokenizer is None:
            generators["score"] = TeacherScorer(
                self.teacher,
                self.run_data.data.prompts,
                self.run_data.tokenizer.pad_token_id,
                self.vocabulary,
                self.accelerator.device,
                self._rank_shards,
            )
        if Text.STUDENT in text.writers:
            generators["student"] = StudentGenerator(
                self._student_sampler(text),
                self.lend,
                self.run_data.data.prompts,
                text,
                self.resolved.settings.seed,
                self._rank_shards,
                None if self.teacher is None else self.teacher.model,
                generators.get("score"),
                rollout_loss,
                policy=self._policy_scorer(text.backend),
                decode=partial(self.run_data.tokenizer.decode, skip_special_tokens=True),
                reward=self._reward(text.student_sampling.reward),
            )
        if Text.TEACHER in text.writers:
            generators["teacher"] = self._teacher_generator(text)
        return open_source(objective, self.resolved, self.run_data, model=self.student, **generators)

    def _reward(self, metric: str | None) -> Reward | None:
        if metric is None:
            return None
        return Reward(self.resolved.registry.get(MetricSpec, metric).spec, self.run_data.data.prompts)

    @property
    def _rank_shards(self) -> RankShards:
        if self.accelerator.num_processes == 1:
            return RankShards()
        from accelerate.utils import gather_object

        return RankShards(self.accelerator.process_index, self.accelerator.num_processes, gather_object)

    def _policy_scorer(self, backend: str) -> PolicyScorer | None:
        """On a CPU dpkd's own sampler computes as the training step does; all others have other kernels and types."""
        device = self.accelerator.device
        if device.type == "cpu" and backend == "hf":
            return None
        pad_id = self.run_data.tokenizer.pad_token_id
        return PolicyScorer(self.vocabulary, pad_id, device, self.accelerator.autocast)

    def _student_sampler(self, text: SourceConfig) -> Sampler:
        """One for all texts that are drawn in one way: an engine beside the model is large."""
        key = (text.backend, text.backend_settings, text.decoding)
        for known, sampler in self._samplers:
            if known == key:
                return sampler
        run_data = self.run_data
        new_tokens = max(objective.text.sampling.max_new_tokens for objective in self.resolved.objectives)
        longest = longest_asked(run_data.data.prompts, new_tokens)
        model = generation_model(
            self.student, self.vocabulary, run_data.tokenizer, run_data.context, text.decoding, longest
        )
        sampler = open_sampler(self.resolved.registry, text.backend, text.backend_settings, model)
        self._samplers.append((key, sampler))
        return sampler

    def _teacher_generator(self, text: SourceConfig) -> TeacherGenerator | RetokenizedResponses:
        # Settings without a teacher, or with one that writes nothing, are refused before.
        assert self.teacher is not None
        own = self.teacher.text()
        assert own is not None
        run_data, retokenizer = self.run_data, self.run_data.retokenizer
        prompts: Sequence[Prompt] = run_data.data.prompts
        context, tokenizer = run_data.context, run_data.tokenizer
        if retokenizer is not None:
            prompts, context, tokenizer = retokenizer.prompts, retokenizer.longest, retokenizer.teacher.tokenizer
        generator = teacher_generator(
            text,
            own,
            prompts,
            registry=self.resolved.registry,
            tokenizer=tokenizer,
            context=context,
            seed=self.resolved.settings.seed,
            rank_shards=self._rank_shards,
            progress=self.display.pulse,
        )
        if retokenizer is None:
            return generator
        return RetokenizedResponses(generator, retokenizer, run_data.data.prompts, run_data.context)
