"""Several teachers in the place of one: one for each kind of prompt, or a mixture of all of them.

A teacher may also read a context before the prompt that the student does not see. Shapes: N response positions, n of a
chunk, V shared vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from dpkd.api import Block, TeacherAccess, hookimpl
from dpkd.api.teachers import (
    SharedVocabulary,
    Teacher,
    TeacherBatch,
    TeacherOffer,
    TeacherOutput,
    TeacherPrompt,
    TeacherSpec,
    Wants,
)
from dpkd.data.batches import TokenSequence, collate
from dpkd.data.encoding import encode, prompt_prefix
from dpkd.errors import DpkdError
from dpkd.functional import log_softmax
from dpkd.models.in_memory import InMemory
from dpkd.models.loading import context_length
from dpkd.models.settings import TeacherSettings
from dpkd.teachers.built_in import built_in_kind

# From least to most: what all of them give is the least that one gives.
_ACCESS = list(TeacherAccess)


class MemberSettings(TeacherSettings):
    """One of several teachers."""

    when: str | None = Field(
        None, description="regular expression: this teacher scores the prompts in which it is found; None: the others"
    )
    weight: float | None = Field(None, gt=0, description="share in a mixture of all teachers; None: no mixture")
    context: str = Field("", description="text that this teacher reads before the prompt, and the student does not")

    @field_validator("when")
    @classmethod
    def _compiles(cls, when: str | None) -> str | None:
        try:
            re.compile(when or "")
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        return when

    @model_validator(mode="after")
    def _is_one(self) -> MemberSettings:
        if self.kind != "auto" or not (self.model or self.store or self.server or self.base):
            raise ValueError("names no `model`, `store`, `server` or `base`")
        return self


class SeveralSettings(Block):
    """The teachers by name; they are tried in this order."""

    column: str | None = Field(None, description="column of the data that names the teacher of each row")
    teachers: dict[str, MemberSettings] = Field(min_length=1, description="settings of each teacher, by a name")

    @model_validator(mode="after")
    def _routed_or_mixed(self) -> SeveralSettings:
        members = list(self.teachers.values())
        weights = [member.weight for member in members]
        if any(weights) and not all(weights):
            raise ValueError("`weight` makes a mixture: give one to each teacher, or to none")
        if any(weights) and any(member.when for member in members):
            raise ValueError("teachers are either mixed (`weight`) or chosen for each prompt (`when`), not both")
        if self.column is not None and (any(weights) or any(member.when for member in members)):
            raise ValueError("with a `column`, rows name their teacher: leave out `when` and `weight`")
        if self.column is None and not any(weights) and sum(member.when is None for member in members) != 1:
            raise ValueError("exactly one teacher must be without `when`: it scores all other prompts")
        return self

    @property
    def weights(self) -> list[float] | None:
        """Shares of a mixture, which add up to 1; None where each prompt has one teacher."""
        weights = [member.weight for member in self.teachers.values() if member.weight is not None]
        return [weight / sum(weights) for weight in weights] if weights else None


class SeveralTeachers(Teacher):
    """Scores each response by the teacher of its prompt, or by the average of their probabilities."""

    def __init__(self, settings: SeveralSettings) -> None:
        self._settings = settings
        self.members = {name: _kind(member).open(member) for name, member in settings.teachers.items()}
        self.measurable = all(member.measurable for member in self.members.values())
        self.remote = any(member.remote for member in self.members.values())
        self._counts = dict.fromkeys(self.members, 0)
        self.of_student = any(member.of_student for member in self.members.values())
        self.column = settings.column
        self._named: dict[tuple[int, ...], str] = {}

    @property
    def offers(self) -> TeacherAccess:  # type: ignore[override]
        """What all of them give."""
        return several_offer(self._settings).access

    def describe(self) -> str:
        how = "mixed" if self._settings.weights else "one for each prompt"
        return f"{how}: " + "; ".join(f"{name}: {member.describe()}" for name, member in self.members.items())

    def fingerprint(self) -> str:
        rules = [(m.when, m.weight, m.context) for m in self._settings.teachers.values()]
        parts = [
            f"{name}={one.fingerprint()}{rule}" for (name, one), rule in zip(self.members.items(), rules, strict=True)
        ]
        return ";".join(parts)

    def weight_bytes(self, dtype: torch.dtype | None = None) -> float:
        return sum(member.weight_bytes(dtype) for member in self.members.values())

    def prepare_for(self, kept: int, chosen: int) -> None:
        for member in self.members.values():
            member.prepare_for(kept, chosen)
        self.chooses = any(member.chooses for member in self.members.values())

    def check(self, tokenizer: Any) -> None:
        for member in self.members.values():
            member.check(tokenizer)
        self._tokenizer = tokenizer
        prefix = prompt_prefix(tokenizer)
        self._prefix = len(prefix)
        texts = [member.context for member in self._settings.teachers.values()]
        self._contexts = dict(zip(self.members, map(tuple, encode(tokenizer, texts)), strict=True))
        limits = [
            limit - len(self._contexts[name])
            for name, member in self.members.items()
            if (limit := member.context or (context_length(member.config) if member.config else None)) is not None
        ]
        self.context = min(limits, default=None)

    def meet(self, prompts: Sequence[TeacherPrompt]) -> None:
        """Note the teacher that each row names. Raises DpkdError for one that there is not, or two of one prompt."""
        for prompt in prompts:
            if prompt.teacher is None:
                continue
            if prompt.teacher not in self.members:
                known = ", ".join(self.members)
                raise DpkdError(f"{prompt.id}: `{self.column}` names the teacher {prompt.teacher!r}; there are {known}")
            if self._named.setdefault(prompt.prompt_ids, prompt.teacher) != prompt.teacher:
                other = self._named[prompt.prompt_ids]
                raise DpkdError(
                    f"{prompt.id}: `{self.column}` names the teacher {prompt.teacher!r}, and another row with the same "
                    f"prompt {other!r}: what the student writes to it would have two. Leave one row out."
                )

    def load(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        for member in self.members.values():
            member.load(device, dtype)
        self._device = device

    def share(self, tokenizer: Any, student_rows: int) -> SharedVocabulary:
        """The ids that all of them and the student predict."""
        size = min(member.share(tokenizer, student_rows).size for member in self.members.values())
        found = {name: member.share(tokenizer, size) for name, member in self.members.items()}
        if len({shared.size for shared in found.values()}) > 1:
            sizes = ", ".join(f"{name}: {shared.size:,}" for name, shared in found.items())
            raise DpkdError(f"teacher.settings.teachers: they have different vocabularies ({sizes})")
        self.vocabulary, note = next(iter(found.values()))
        return SharedVocabulary(self.vocabulary, note)

    def join(self, student: nn.Module) -> None:
        for member in self.members.values():
            member.join(student)

    def expect(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], wants: Wants) -> None:
        for name, places in self._shares(sequences).items():
            self.members[name].expect([self._read_by(name, sequences[i]) for i in places], wants)

    def score(self, batch: TeacherBatch, wants: Wants) -> TeacherOutput:
        """Each teacher scores its share of the sequences, of a mixture all of them."""
        if wants.layers:
            raise DpkdError("hidden states of several teachers are not one teacher's")
        targets, lengths = batch.targets.to(self._device), batch.lengths.tolist()
        firsts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        outputs, rows = [], []
        for name, places in self._shares(batch.sequences).items():
            own = torch.cat([torch.arange(firsts[i], firsts[i + 1]) for i in places]).to(self._device)
            part = collate(
                [self._read_by(name, batch.sequences[i]) for i in places], pad_id=self._tokenizer.pad_token_id
            ).to(self._device)
            chosen = None if wants.chosen is None else wants.chosen[own]
            outputs.append(self.members[name].score(part, wants._replace(chosen=chosen)))
            rows.append(own)
            self._counts[name] += len(own)
        weights = self._settings.weights
        if weights is not None:
            return MixedRows(outputs, weights, targets, wants.chunk)
        return RoutedRows(outputs, rows, targets, wants.chunk, self.vocabulary)

    def statistics(self) -> Mapping[str, float]:
        """Tokens that each scored, and what each measured of itself."""
        found = {f"teacher/{name}/tokens": float(count) for name, count in self._counts.items()}
        for name, member in self.members.items():
            own = member.statistics().items()
            found |= {f"teacher/{name}/{key.removeprefix('teacher/')}": value for key, value in own}
        self._counts = dict.fromkeys(self.members, 0)
        return found

    def close(self) -> None:
        for member in self.members.values():
            member.close()

    def _shares(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, list[int]]:
        """The sequences that each teacher scores, by number; without those that have none."""
        if self._settings.weights is not None:
            return {name: list(range(len(sequences))) for name in self.members}
        shares: dict[str, list[int]] = {name: [] for name in self.members}
        for number, (prompt, _) in enumerate(sequences):
            shares[self._teacher_of(tuple(prompt))].append(number)
        return {name: numbers for name, numbers in shares.items() if numbers}

    def _teacher_of(self, prompt: tuple[int, ...]) -> str:
        text = self._tokenizer.decode(list(prompt), skip_special_tokens=True)
        if self.column is not None:
            if prompt not in self._named:
                raise DpkdError(f"no row of the data has this prompt, and so none names its teacher: {text[:80]!r}")
            return self._named[prompt]
        rules = self._settings.teachers.items()
        found = [name for name, member in rules if member.when is not None and re.search(member.when, text)]
        return found[0] if found else next(name for name, member in rules if member.when is None)

    def _read_by(self, name: str, sequence: tuple[Sequence[int], Sequence[int]]) -> TokenSequence:
        """A sequence with the context of a teacher, which comes after BOS."""
        prompt, response = sequence
        at = self._prefix if self._contexts[name] else 0
        return TokenSequence((*prompt[:at], *self._contexts[name], *prompt[at:]), tuple(response))


class MixedRows(TeacherOutput):
    """The average of the probabilities of several teachers."""

    def __init__(self, outputs: Sequence[TeacherOutput], weights: Sequence[float], targets: Tensor, chunk: int) -> None:
        super().__init__(targets, chunk)
        self.outputs, self._logs = outputs, [math.log(weight) for weight in weights]

    def logits(self, rows: slice) -> Tensor:
        """log Σ w p `[n, V]`."""
        parts = [log_softmax(out.logits(rows)) + log for out, log in zip(self.outputs, self._logs, strict=True)]
        return torch.stack(parts).logsumexp(0)

    def logps(self) -> Tensor:
        """log Σ w p(y) `[N]`."""
        return torch.stack([o.logps() + log for o, log in zip(self.outputs, self._logs, strict=True)]).logsumexp(0)

    def is_finite(self) -> bool:
        return all(output.is_finite() for output in self.outputs)


class RoutedRows(TeacherOutput):
    """Rows of several teachers in the order of the batch: `places` has the rows `[M]` of each, ascending."""

    def __init__(
        self, outputs: Sequence[TeacherOutput], places: Sequence[Tensor], targets: Tensor, chunk: int, vocabulary: int
    ) -> None:
        super().__init__(targets, chunk)
        self.outputs, self.places, self.vocabulary = outputs, places, vocabulary

    def logits(self, rows: slice) -> Tensor:
        """Logits `[n, V]` of some rows, each by its teacher."""
        start, stop, _ = rows.indices(len(self.targets))
        found = torch.empty(stop - start, self.vocabulary, device=self.targets.device)
        for output, places in zip(self.outputs, self.places, strict=True):
            first, last = torch.searchsorted(places, torch.tensor([start, stop], device=places.device)).tolist()
            if last > first:
                found[places[first:last] - start] = output.logits(slice(first, last)).float()
        return found

    def logps(self) -> Tensor:
        """Log-prob `[N]` of each response token by its teacher."""
        found = torch.empty(len(self.targets), device=self.targets.device)
        for output, places in zip(self.outputs, self.places, strict=True):
            found[places] = output.logps().float()
        return found

    def is_finite(self) -> bool:
        return all(output.is_finite() for output in self.outputs)


def several_offer(settings: SeveralSettings) -> TeacherOffer:
    """What all of them give: the least of each; no text, which would have several authors."""
    offers = [_kind(member).offer(member) for member in settings.teachers.values()]
    least = min(offers, key=lambda offer: _ACCESS.index(offer.access))
    access = TeacherAccess.LOGITS if least.access is TeacherAccess.HIDDEN else least.access
    own = [offer.writers for offer in offers if offer.writers is not None]
    return TeacherOffer(
        access,
        k=min((offer.k for offer in offers if offer.k), default=0),
        vocabulary=least.vocabulary,
        writers=frozenset.intersection(*own) if own else None,
        writes=False,
        what="one of several teachers",
        has=least.has,
        more=least.more,
    )


def _kind(settings: MemberSettings) -> TeacherSpec:
    spec = built_in_kind(settings, InMemory())
    assert spec is not None  # a member names a model, a store, a server or the base
    return spec


SPEC = TeacherSpec(
    "several",
    "Several teachers: one for each kind of prompt, or a mixture; each may read a context of its own.",
    open=SeveralTeachers,
    offer=several_offer,
    config=SeveralSettings,
)


@hookimpl
def dpkd_teachers() -> list[TeacherSpec]:
    return [SPEC]
