"""Who writes for which losses: the groups of losses that share a text, each with its writers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dpkd.api import Ability, Family, GenerationModel, Sampler, SamplerSpec, Text
from dpkd.api.teachers import Teacher
from dpkd.config.objective import Objective
from dpkd.config.resolve import Resolved
from dpkd.data.batch_sampler import BatchSampler
from dpkd.data.encode import Prompt
from dpkd.errors import DpkdError
from dpkd.models.tokenizers import tokenizer_fingerprint
from dpkd.rollout.generator import open_sampler
from dpkd.rollout.response_generators import RankShards, RetokenizedResponses, StudentGenerator, TeacherGenerator
from dpkd.rollout.response_store import ResponseStore, default_folder
from dpkd.rollout.settings import TextSettings
from dpkd.rollout.sources import Writers
from dpkd.train.prepare import Prepared
from dpkd.train.progress import Display
from dpkd.train.step_batches import LossGroup

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_groups(resolved: Resolved, losses: Mapping[str, Any], rollouts: RolloutBuilder) -> list[LossGroup]:
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
                rollouts.writers(first, loss),
                first.spec.family is Family.PAIR,
                {member.name: (member.reads, member.weight) for member in members},
                rollouts.prepared.translator,
            )
        )
    return groups


def check_processes(resolved: Resolved, processes: int) -> None:
    """Raises DpkdError when a sampler cannot work in several processes, and there are several."""
    for objective in resolved.objectives:
        if processes == 1 or set(objective.writers.values()) <= {Text.DATASET}:
            continue
        backend = objective.text.backend
        reason = resolved.registry.get(SamplerSpec, backend).spec.lacks.get(Ability.SEVERAL_PROCESSES)
        if reason is not None:
            raise DpkdError(
                f"text.backend: {backend} works in one process only, and there are {processes}: {reason}. "
                "Start one process, or set text.backend=hf."
            )


@dataclass
class RolloutBuilder:
    """Everything that writing needs: who writes a text is put together here, for each group of losses."""

    resolved: Resolved
    student: nn.Module
    lend: Callable[[Callable[[nn.Module], Any]], Any]  # the student with whole weights, for the time of a call
    teacher: Teacher | None
    vocabulary: int
    prepared: Prepared
    accelerator: Accelerator
    display: Display
    _samplers: list[tuple[tuple[str, Any], Sampler]] = field(default_factory=list)

    def close(self) -> None:
        """Give back what the samplers of the student hold."""
        while self._samplers:
            self._samplers.pop()[1].close()

    def writers(self, objective: Objective, rollout_loss: Any | None) -> Writers:
        """The writers of the text of a loss."""
        text, wanted = objective.text, objective.writers.values()
        settings, tokenizer, data = self.resolved.settings, self.prepared.tokenizer, self.prepared.data
        student = self._student_generator(text, rollout_loss) if Text.STUDENT in wanted else _nobody
        teacher = self._teacher_generator(text) if Text.TEACHER in wanted else _nobody
        schedule = BatchSampler(
            [len(p.prompt_ids) + len(p.response_ids) for p in data.prompts],
            batch_size=settings.train.batch_size,
            steps=self.prepared.steps,
            seed=settings.seed,
            refresh=text.refresh,
            every=text.every,
            num_iterations=text.num_iterations,
        )
        return Writers(
            text,
            objective.spec.family,
            data.prompts,
            schedule,
            seed=settings.seed,
            eos_ids=frozenset({tokenizer.eos_token_id}),
            student=student,
            teacher=teacher,
        )

    def _student_generator(self, text: TextSettings, rollout_loss: Any | None) -> StudentGenerator:
        return StudentGenerator(
            self._student_sampler(text),
            self.lend,
            self.prepared.data.prompts,
            text,
            self.prepared.tokenizer.pad_token_id,
            self.vocabulary,
            self.resolved.settings.seed,
            _rank_shards(self.accelerator),
            self.accelerator.device,
            self.teacher,
            rollout_loss,
        )

    def _student_sampler(self, text: TextSettings) -> Sampler:
        """One for all texts that are drawn in one way: an engine beside the model is large."""
        key = (text.backend, text.backend_settings)
        for known, sampler in self._samplers:
            if known == key:
                return sampler
        writer = _generation_model(self.student, self.vocabulary, self.prepared.tokenizer, self.prepared.context)
        sampler = open_sampler(self.resolved.registry, text, writer)
        self._samplers.append((key, sampler))
        return sampler

    def _teacher_generator(self, text: TextSettings) -> TeacherGenerator | RetokenizedResponses:
        """Its responses are in the store of log-probs, where there is one, else in the store of responses."""
        # Settings without a teacher, or with one that writes nothing, are refused before.
        assert self.teacher is not None
        own = self.teacher.text()
        assert own is not None
        prepared, translator = self.prepared, self.prepared.translator
        tokenizer = prepared.tokenizer if translator is None else translator.teacher.tokenizer
        read = (prepared.data.prompts, prepared.context)
        prompts, context = read if translator is None else (translator.prompts, translator.longest)
        writer = None if own.model is None else _generation_model(own.model, own.vocabulary, tokenizer, None)
        folder = own.folder or (Path(text.store) if text.store else default_folder())
        generator = self._generator(text, writer, folder, own.fingerprint, prompts, context, tokenizer)
        if translator is None:
            return generator
        return RetokenizedResponses(generator, translator, prepared.data.prompts, prepared.context)

    def _generator(
        self,
        text: TextSettings,
        writer: GenerationModel | None,
        folder: Path,
        weights: str,
        prompts: Sequence[Prompt],
        context: int | None,
        tokenizer: Any | None = None,
    ) -> TeacherGenerator:
        """The pen of a teacher; without a `writer`, all that is wanted must be in the store."""
        tokenizer = tokenizer or self.prepared.tokenizer
        vocabulary = self.vocabulary if writer is None else writer.vocabulary
        store = ResponseStore.open(
            folder,
            model_fingerprint=weights,
            # Which ids may be drawn decides the responses too.
            tokenizer_fingerprint=f"{tokenizer_fingerprint(tokenizer)}/{vocabulary}",
            sampling=text.teacher_sampling,
            seed=self.resolved.settings.seed,
            backend=text.backend_key,
        )
        return TeacherGenerator(
            None if writer is None else lambda: open_sampler(self.resolved.registry, text, writer),
            prompts,
            text.teacher_sampling,
            self.resolved.settings.seed,
            _rank_shards(self.accelerator),
            context,
            store,
            lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
            self.display.pulse,
        )


def _generation_model(model: nn.Module, vocabulary: int, tokenizer: Any, context: int | None) -> GenerationModel:
    return GenerationModel(model, vocabulary, frozenset({tokenizer.eos_token_id}), tokenizer.pad_token_id, context)


def _nobody(*asked: Any) -> Any:
    raise AssertionError("nobody is asked for a text that the settings do not have")


def _rank_shards(accelerator: Accelerator) -> RankShards:
    if accelerator.num_processes == 1:
        return RankShards()
    from accelerate.utils import gather_object

    gather: Callable[[list[Any]], list[Any]] = gather_object
    return RankShards(accelerator.process_index, accelerator.num_processes, gather)
