"""Who writes for which losses: the groups of losses that share a text, each with its writers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dpkd.api import Ability, Family, Sampler, Text, Writer
from dpkd.config.objective import Objective
from dpkd.config.resolve import Resolved
from dpkd.data.order import Schedule
from dpkd.data.tokenise import Prompt
from dpkd.engine.preparation import Prepared
from dpkd.engine.progress import Display
from dpkd.engine.streams import Group
from dpkd.errors import DpkdError
from dpkd.host import find_sampler
from dpkd.models.tokenizers import tokenizer_fingerprint
from dpkd.teachers.aligned import AlignedTeacher
from dpkd.teachers.live import LiveTeacher
from dpkd.teachers.stored import StoredTeacher
from dpkd.text.backend import open_sampler
from dpkd.text.pens import Crew, RetellingPen, StudentPen, TeacherPen
from dpkd.text.settings import TextSettings
from dpkd.text.store import ResponseStore, default_folder
from dpkd.text.writers import Writers

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Studio", "check_processes", "make_groups"]


def make_groups(resolved: Resolved, losses: Mapping[str, Any], studio: Studio) -> list[Group]:
    """The losses by the text that they share: the main one with all that take its responses, then the others."""
    main, *extras = resolved.objectives
    sharing = [main, *(extra for extra in extras if extra.shares_text)]
    groups = []
    for members in ([*sharing], *([extra] for extra in extras if not extra.shares_text)):
        first = members[0]
        loss = losses[first.name] if first.spec.family is Family.ROLLOUT else None
        groups.append(
            Group(
                first.name, studio.writers(first, loss), first.spec.family is Family.PAIR,
                {member.name: (member.reads, member.weight) for member in members}, studio.prepared.translator,
            )
        )  # fmt: skip
    return groups


def check_processes(resolved: Resolved, processes: int) -> None:
    """Raises DpkdError when a sampler cannot work in several processes, and there are several."""
    for objective in resolved.objectives:
        if processes == 1 or set(objective.writers.values()) <= {Text.DATASET}:
            continue
        backend = objective.text.backend
        reason = find_sampler(backend).lacks.get(Ability.SEVERAL_PROCESSES)
        if reason is not None:
            raise DpkdError(
                f"text.backend: {backend} works in one process only, and there are {processes}: {reason}. "
                "Start one process, or set text.backend=hf."
            )


@dataclass
class Studio:
    """Everything that writing needs: who writes a text is put together here, for each group of losses."""

    resolved: Resolved
    student: nn.Module
    lend: Callable[[Callable[[nn.Module], Any]], Any]  # the student with whole weights, for the time of a call
    teacher: LiveTeacher | StoredTeacher | AlignedTeacher | None
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
        student = self._student_pen(text, rollout_loss) if Text.STUDENT in wanted else _nobody
        teacher = self._teacher_pen(text) if Text.TEACHER in wanted else _nobody
        schedule = Schedule(
            [len(p.prompt_ids) + len(p.response_ids) for p in data.prompts], batch_size=settings.train.batch_size,
            steps=self.prepared.steps, seed=settings.seed, refresh=text.refresh, every=text.every,
            inner_epochs=text.inner_epochs,
        )  # fmt: skip
        return Writers(
            text, objective.spec.family, data.prompts, schedule, seed=settings.seed,
            eos_ids=frozenset({tokenizer.eos_token_id}), student=student, teacher=teacher,
        )  # fmt: skip

    def _student_pen(self, text: TextSettings, rollout_loss: Any | None) -> StudentPen:
        live = self.teacher if isinstance(self.teacher, LiveTeacher) else None
        return StudentPen(
            self._student_sampler(text), self.lend, self.prepared.data.prompts, text,
            self.prepared.tokenizer.pad_token_id, self.vocabulary, self.resolved.settings.seed,
            _crew(self.accelerator), self.accelerator.device, live, rollout_loss,
        )  # fmt: skip

    def _student_sampler(self, text: TextSettings) -> Sampler:
        """One for all texts that are drawn in one way: an engine beside the model is large."""
        key = (text.backend, text.backend_settings)
        for known, sampler in self._samplers:
            if known == key:
                return sampler
        writer = _writer(self.student, self.vocabulary, self.prepared.tokenizer, self.prepared.context)
        sampler = open_sampler(text, writer)
        self._samplers.append((key, sampler))
        return sampler

    def _teacher_pen(self, text: TextSettings) -> TeacherPen | RetellingPen:
        """Its responses are in the store of log-probs, where there is one, else in the store of responses."""
        settings, prepared = self.resolved.settings, self.prepared
        if isinstance(self.teacher, StoredTeacher):
            folder = self.teacher.folder / "responses"
            return self._pen(text, None, folder, self.teacher.manifest.model, prepared.data.prompts, prepared.context)
        # Settings without a teacher are refused before.
        assert self.teacher is not None
        weights = self.resolved.given.fingerprint(settings.teacher)
        folder = Path(text.store) if text.store else default_folder()
        if isinstance(self.teacher, LiveTeacher):
            writer = _writer(self.teacher.model, self.vocabulary, prepared.tokenizer, None)
            return self._pen(text, writer, folder, weights, prepared.data.prompts, prepared.context)
        translator = prepared.translator
        assert translator is not None  # it made the teacher an aligned one
        tokenizer = translator.teacher.tokenizer
        writer = _writer(self.teacher.live.model, self.teacher.union.teacher, tokenizer, None)
        pen = self._pen(text, writer, folder, weights, translator.prompts, translator.longest, tokenizer)
        return RetellingPen(pen, translator, prepared.data.prompts, prepared.context)

    def _pen(
        self, text: TextSettings, writer: Writer | None, folder: Path, weights: str, prompts: Sequence[Prompt],
        context: int | None, tokenizer: Any | None = None,
    ) -> TeacherPen:  # fmt: skip
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
        return TeacherPen(
            None if writer is None else lambda: open_sampler(text, writer),
            prompts, text.teacher_sampling, self.resolved.settings.seed, _crew(self.accelerator), context, store,
            lambda ids: tokenizer.decode(ids, skip_special_tokens=True), self.display.pulse,
        )  # fmt: skip


def _writer(model: nn.Module, vocabulary: int, tokenizer: Any, context: int | None) -> Writer:
    return Writer(model, vocabulary, frozenset({tokenizer.eos_token_id}), tokenizer.pad_token_id, context)


def _nobody(*asked: Any) -> Any:
    raise AssertionError("nobody is asked for a text that the settings do not have")


def _crew(accelerator: Accelerator) -> Crew:
    if accelerator.num_processes == 1:
        return Crew()
    from accelerate.utils import gather_object

    gather: Callable[[list[Any]], list[Any]] = gather_object
    return Crew(accelerator.process_index, accelerator.num_processes, gather)
