"""From the text of a step to its streams: which sequences, which losses, and the one denominator of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpkd.api import Family, Signal, Text
from dpkd.config.settings import TermSettings
from dpkd.data.batches import TokenSequence
from dpkd.data.corpus import Corpus as Blocks
from dpkd.data.order import Schedule
from dpkd.data.tokenise import Prompt
from dpkd.engine.work import Stream, Term, Unit
from dpkd.text.writers import StepText

__all__ = ["Corpus", "StreamBuilder"]

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
class StreamBuilder:
    """Builds the streams of a step. Denominators are counted here, once, after the text is final."""

    family: Family
    reads: frozenset[Signal]
    terms: TermSettings
    pretrain_reads: frozenset[Signal]
    prompts: Sequence[Prompt]
    corpus: Corpus | None

    def streams(self, step: int, text: StepText, window: Sequence[int]) -> list[Stream]:
        """All streams of a step, over all processes."""
        main = self._main(text)
        streams = [main]
        if self.terms.lm.weight > 0:
            streams = self._with_lm(main, window)
        if self.terms.pretrain.weight > 0 and self.corpus is not None:
            blocks = [self.corpus.blocks[i] for i in self.corpus.schedule.window(step)]
            units = [Unit((TokenSequence((), block),)) for block in blocks]
            term = Term("pretrain", self.pretrain_reads, self.terms.pretrain.weight, max(1, _tokens(units)))
            streams.append(Stream("pretrain", units, [term]))
        return streams

    def _main(self, text: StepText) -> Stream:
        units = [
            Unit(tuple(TokenSequence(self.prompts[i].prompt_ids, r.ids) for r in responses), responses)
            for i, responses in text.responses
        ]
        pairs = self.family is Family.PAIR
        denominator = max(1, len(units) if pairs else _tokens(units))
        return Stream("main", units, [Term("main", self.reads, self.terms.main, denominator)], pairs)

    def _with_lm(self, main: Stream, window: Sequence[int]) -> list[Stream]:
        """The LM term shares the main stream where that is the data set's text, else it has its own."""
        weight = self.terms.lm.weight
        shared = not main.pairs and all(r.writer is Text.DATASET for unit in main.units for r in unit.responses)
        if shared:
            term = Term("lm", LM_READS, weight, main.terms[0].denominator)
            return [Stream(main.name, main.units, [*main.terms, term])]
        units = [
            Unit((TokenSequence(self.prompts[i].prompt_ids, self.prompts[i].response_ids),))
            for i in window
            if self.prompts[i].response_ids
        ]
        return [main, Stream("lm", units, [Term("lm", LM_READS, weight, max(1, _tokens(units)))])]
