"""From the text of a step to its streams: which sequences, which losses, and the one denominator of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpkd.api import Signal, Text
from dpkd.config.settings import TermSettings
from dpkd.data.batches import TokenSequence
from dpkd.data.corpus import Corpus as Blocks
from dpkd.data.order import Schedule
from dpkd.data.tokenise import Prompt
from dpkd.data.twins import Translator
from dpkd.engine.work import Stream, Term, Unit
from dpkd.text.writers import StepText, Writers

__all__ = ["Corpus", "Group", "StreamBuilder"]

LM_READS = frozenset({Signal.STUDENT_LOGITS, Signal.TARGETS})


@dataclass(frozen=True)
class Corpus:
    """Blocks of plain text and the order in which steps use them."""

    blocks: Blocks
    schedule: Schedule


def _tokens(units: Sequence[Unit]) -> int:
    """Response tokens that have a row: a first token with nothing before it has none."""
    return sum(len(s.response_ids) - (not s.prompt_ids) for unit in units for s in unit.sequences)


@dataclass(frozen=True)
class Group:
    """The losses that are taken from the same responses: one forward for all of them."""

    name: str  # of its first loss
    writers: Writers
    pairs: bool
    losses: Mapping[str, tuple[frozenset[Signal], float]]  # name → what it reads, its weight
    translator: Translator | None = None  # to a teacher with another tokenizer

    def stream(self, text: StepText, prompts: Sequence[Prompt]) -> Stream:
        """Its stream of a step."""
        units = [
            Unit(tuple(TokenSequence(prompts[i].prompt_ids, r.ids) for r in responses), responses)
            for i, responses in text.responses
        ]
        spans = None
        if self.translator is not None and any(map(_on_spans, self.losses.values())):
            # A teacher with other tokens shares no prompt: each response stands by itself.
            apart = [(i, response) for i, responses in text.responses for response in responses]
            twins = self.translator.twins([(i, response.ids) for i, response in apart])
            units = [
                Unit((TokenSequence(prompts[i].prompt_ids, response.ids),), (response,), twin)
                for (i, response), twin in zip(apart, twins, strict=True)
            ]
            spans = sum(len(twin.spans) for twin in twins)
        rows = len(units) if self.pairs else _tokens(units)
        terms = [
            Term(name, loss[0], loss[1], max(1, rows if spans is None or not _on_spans(loss) else spans))
            for name, loss in self.losses.items()
        ]
        return Stream(self.name, units, terms, self.pairs)


def _on_spans(loss: tuple[frozenset[Signal], float]) -> bool:
    """Whether the rows of a loss are spans, where tokenizers differ: if it reads the teacher."""
    return Signal.TEACHER_LOGITS in loss[0]


@dataclass(frozen=True)
class StreamBuilder:
    """Builds the streams of a step. Denominators are counted here, once, after the text is final."""

    groups: Sequence[Group]
    terms: TermSettings
    pretrain_reads: frozenset[Signal]
    prompts: Sequence[Prompt]
    corpus: Corpus | None

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each loss of the run."""
        own = {name: weight for group in self.groups for name, (_, weight) in group.losses.items()}
        return {**own, "lm": self.terms.lm.weight, "pretrain": self.terms.pretrain.weight}

    def streams(self, step: int, texts: Sequence[StepText]) -> list[Stream]:
        """All streams of a step, over all processes; `texts` has the responses of each group."""
        blocks = self.corpus.schedule.window(step) if self.corpus is not None else []
        return self.build(texts, self.groups[0].writers.schedule.window(step), blocks)

    def build(self, texts: Sequence[StepText], window: Sequence[int], blocks: Sequence[int]) -> list[Stream]:
        """The streams of a text of each group, of examples for the LM term, and of blocks of plain text."""
        streams = [group.stream(text, self.prompts) for group, text in zip(self.groups, texts, strict=True)]
        if self.terms.lm.weight > 0:
            streams = [*self._with_lm(streams[0], window), *streams[1:]]
        if self.terms.pretrain.weight > 0 and self.corpus is not None:
            units = [Unit((TokenSequence((), self.corpus.blocks[i]),)) for i in blocks]
            term = Term("pretrain", self.pretrain_reads, self.terms.pretrain.weight, max(1, _tokens(units)))
            streams.append(Stream("pretrain", units, [term]))
        return streams

    def _with_lm(self, main: Stream, window: Sequence[int]) -> list[Stream]:
        """The LM term shares the main stream where that is the data set's text, else it has its own."""
        weight = self.terms.lm.weight
        shared = not main.pairs and all(r.writer is Text.DATASET for unit in main.units for r in unit.responses)
        if shared:
            term = Term("lm", LM_READS, weight, max(1, _tokens(main.units)))
            return [Stream(main.name, main.units, [*main.terms, term])]
        units = [
            Unit((TokenSequence(self.prompts[i].prompt_ids, self.prompts[i].response_ids),))
            for i in window
            if self.prompts[i].response_ids
        ]
        return [main, Stream("lm", units, [Term("lm", LM_READS, weight, max(1, _tokens(units)))])]
