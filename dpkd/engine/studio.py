"""Who writes for which losses: the groups of losses that share a text, each with its writers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dpkd.api import Family, Text
from dpkd.config.objective import Objective
from dpkd.config.resolve import Resolved
from dpkd.data.order import Schedule
from dpkd.engine.preparation import Prepared
from dpkd.engine.progress import Display
from dpkd.engine.streams import Group
from dpkd.models.tokenizers import tokenizer_fingerprint
from dpkd.teachers.aligned import AlignedTeacher
from dpkd.teachers.live import LiveTeacher
from dpkd.teachers.stored import StoredTeacher
from dpkd.text.pens import Crew, RetellingPen, StudentPen, TeacherPen
from dpkd.text.settings import TextSettings
from dpkd.text.store import ResponseStore, default_folder
from dpkd.text.writers import Writers

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Studio", "make_groups"]


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


@dataclass
class Studio:
    """Everything that writing needs: who writes a text is put together here, for each group of losses."""

    resolved: Resolved
    lend: Callable[[Callable[[nn.Module], Any]], Any]  # gives the student
    teacher: LiveTeacher | StoredTeacher | AlignedTeacher | None
    vocabulary: int
    prepared: Prepared
    accelerator: Accelerator
    display: Display

    def writers(self, objective: Objective, rollout_loss: Any | None) -> Writers:
        """The writers of the text of a loss."""
        text, family = objective.text, objective.spec.family
        settings, tokenizer, data = self.resolved.settings, self.prepared.tokenizer, self.prepared.data
        eos_ids = frozenset({tokenizer.eos_token_id})
        common: Mapping[str, Any] = {
            "prompts": data.prompts, "eos_ids": eos_ids, "pad_id": tokenizer.pad_token_id,
            "vocabulary": self.vocabulary, "seed": settings.seed, "crew": _crew(self.accelerator),
            "context": self.prepared.context,
        }  # fmt: skip
        live = self.teacher if isinstance(self.teacher, LiveTeacher) else None
        student = StudentPen(
            self.lend, settings=text, teacher=live, loss=rollout_loss, device=self.accelerator.device, **common
        )
        writes = Text.TEACHER in objective.writers.values()
        teacher = self._teacher_pen(text, common) if writes else _no_teacher
        schedule = Schedule(
            [len(p.prompt_ids) + len(p.response_ids) for p in data.prompts], batch_size=settings.train.batch_size,
            steps=self.prepared.steps, seed=settings.seed, refresh=text.refresh, every=text.every,
            inner_epochs=text.inner_epochs,
        )  # fmt: skip
        return Writers(
            text, family, data.prompts, schedule, seed=settings.seed, eos_ids=eos_ids, student=student, teacher=teacher
        )

    def _teacher_pen(self, text: TextSettings, common: Mapping[str, Any]) -> TeacherPen | RetellingPen:
        """Its responses are in the store of log-probs, where there is one, else in the store of responses."""
        settings = self.resolved.settings
        if isinstance(self.teacher, StoredTeacher):
            folder = self.teacher.folder / "responses"
            return self._pen(None, text, folder, self.teacher.manifest.model, self.prepared.tokenizer, common)
        # Settings without a teacher are refused before.
        assert settings.teacher.model is not None
        weights = self.resolved.given.fingerprint(settings.teacher)
        folder = Path(text.store) if text.store else default_folder()
        if not isinstance(self.teacher, AlignedTeacher):
            return self._pen(self.teacher, text, folder, weights, self.prepared.tokenizer, common)
        translator = self.prepared.translator
        assert translator is not None  # it made the teacher an aligned one
        tokenizer = translator.teacher.tokenizer
        own = {
            **common, "prompts": translator.prompts, "eos_ids": frozenset({tokenizer.eos_token_id}),
            "pad_id": tokenizer.pad_token_id, "vocabulary": self.teacher.union.teacher, "context": translator.longest,
        }  # fmt: skip
        pen = self._pen(self.teacher.live, text, folder, weights, tokenizer, own)
        return RetellingPen(pen, translator, common["prompts"], common["context"])

    def _pen(
        self, live: LiveTeacher | None, text: TextSettings, folder: Path, weights: str, tokenizer: Any,
        common: Mapping[str, Any],
    ) -> TeacherPen:  # fmt: skip
        store = ResponseStore.open(
            folder,
            model_fingerprint=weights,
            # Which ids may be drawn decides the responses too.
            tokenizer_fingerprint=f"{tokenizer_fingerprint(tokenizer)}/{common['vocabulary']}",
            sampling=text.teacher_sampling,
            seed=self.resolved.settings.seed,
        )
        return TeacherPen(
            live, sampling=text.teacher_sampling, store=store,
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True), progress=self.display.pulse, **common,
        )  # fmt: skip


def _no_teacher(indices: Any) -> Any:
    raise AssertionError("the plan lets no run without a teacher ask for its text")


def _crew(accelerator: Accelerator) -> Crew:
    if accelerator.num_processes == 1:
        return Crew()
    from accelerate.utils import gather_object

    gather: Callable[[list[Any]], list[Any]] = gather_object
    return Crew(accelerator.process_index, accelerator.num_processes, gather)
