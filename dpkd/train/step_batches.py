"""From the text of a step to its step batches: which sequences, which losses, and the one denominator of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpkd.api import ResponseSource, Signal, StepResponses, Text
from dpkd.config.settings import TermSettings
from dpkd.cross_tokenizer.retokenize import Retokenizer
from dpkd.data.batch_sampler import BatchSampler
from dpkd.data.batches import TokenSequence
from dpkd.data.corpus import Corpus as Blocks
from dpkd.data.encode import Prompt
from dpkd.train.microbatch import PromptGroup, StepBatch, Term

LM_READS = frozenset({Signal.STUDENT_LOGITS, Signal.TARGETS})
CHOSEN_READS = frozenset({Signal.STUDENT_LOGPS})


@dataclass(frozen=True)
class CorpusBatches:
    """Blocks of plain text and the order in which steps use them."""

    blocks: Blocks
    schedule: BatchSampler


def _tokens(groups: Sequence[PromptGroup]) -> int:
    return sum(sequence.predicted for group in groups for sequence in group.sequences)


@dataclass(frozen=True)
class LossGroup:
    """The losses that are taken from the same responses: one forward for all of them."""

    name: str  # of its first loss
    source: ResponseSource
    losses: Mapping[str, tuple[frozenset[Signal], float]]  # name → what it reads, its weight
    retokenizer: Retokenizer | None = None  # to a teacher with another tokenizer

    @property
    def pairs(self) -> bool:
        """Whether a row of its losses is a pair of responses."""
        return bool(self.source.config.pairs)

    def step_batch(self, text: StepResponses, prompts: Sequence[Prompt]) -> StepBatch:
        """Its step batch of a step."""
        groups = [
            PromptGroup(tuple(TokenSequence(prompts[i].prompt_ids, r.ids) for r in responses), responses)
            for i, responses in text.responses
        ]
        spans = None
        if self.retokenizer is not None and any(map(_on_spans, self.losses.values())):
            # A teacher with other tokens shares no prompt: each response stands by itself.
            apart = [(i, response) for i, responses in text.responses for response in responses]
            aligned = self.retokenizer.aligned([(i, response.ids) for i, response in apart])
            groups = [
                PromptGroup((TokenSequence(prompts[i].prompt_ids, response.ids),), (response,), aligned)
                for (i, response), aligned in zip(apart, aligned, strict=True)
            ]
            spans = sum(len(aligned.spans) for aligned in aligned)
        rows = len(groups) if self.pairs else _tokens(groups)
        terms = [
            Term(name, loss[0], loss[1], max(1, rows if spans is None or not _on_spans(loss) else spans))
            for name, loss in self.losses.items()
        ]
        return StepBatch(self.name, groups, terms, self.pairs)


def _on_spans(loss: tuple[frozenset[Signal], float]) -> bool:
    """Whether the rows of a loss are spans, where tokenizers differ: if it reads the teacher."""
    return Signal.TEACHER_LOGITS in loss[0]


@dataclass(frozen=True)
class StepBatchBuilder:
    """Builds the step batches of a step. Denominators are counted here, once, after the text is final."""

    groups: Sequence[LossGroup]
    terms: TermSettings
    pretrain_reads: frozenset[Signal]
    prompts: Sequence[Prompt]
    corpus: CorpusBatches | None

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each loss of the run."""
        own = {name: weight for group in self.groups for name, (_, weight) in group.losses.items()}
        return {**own, "lm": self.terms.lm.weight, "pretrain": self.terms.pretrain.weight}

    def step_batches(self, step: int, texts: Sequence[StepResponses]) -> list[StepBatch]:
        """All step batches of a step, over all processes; `texts` has the responses of each group."""
        blocks = self.corpus.schedule.window(step) if self.corpus is not None else []
        return self.build(texts, self.groups[0].source.context.batches.window(step), blocks)

    def build(self, texts: Sequence[StepResponses], window: Sequence[int], blocks: Sequence[int]) -> list[StepBatch]:
        """The step batches of a text of each group, of examples for the LM term, and of blocks of plain text."""
        step_batches = [group.step_batch(text, self.prompts) for group, text in zip(self.groups, texts, strict=True)]
        if self.terms.lm.weight > 0:
            step_batches = [*self._with_lm(step_batches[0], window), *step_batches[1:]]
        if self.terms.pretrain.weight > 0 and self.corpus is not None:
            groups = [PromptGroup((TokenSequence((), self.corpus.blocks[i]),)) for i in blocks]
            term = Term("pretrain", self.pretrain_reads, self.terms.pretrain.weight, max(1, _tokens(groups)))
            step_batches.append(StepBatch("pretrain", groups, [term]))
        return step_batches

    def _with_lm(self, main: StepBatch, window: Sequence[int]) -> list[StepBatch]:
        """The LM term shares the main step batch where that has the data set's text, else it has its own."""
        weight = self.terms.lm.weight
        own = [(self.prompts[i].prompt_ids, self.prompts[i].response_ids) for i in window]
        groups = [PromptGroup((TokenSequence(*ids),)) for ids in own if ids[1]]
        if not main.pairs and all(r.writer is Text.DATASET for group in main.groups for r in group.responses):
            term = Term("lm", LM_READS, weight, max(1, _tokens(main.groups)))
        elif main.pairs and [group.sequences[0] for group in main.groups] == [group.sequences[0] for group in groups]:
            term = Term("lm", CHOSEN_READS, weight, max(1, _tokens(groups)), of_chosen=True)
        else:
            return [main, StepBatch("lm", groups, [Term("lm", LM_READS, weight, max(1, _tokens(groups)))])]
        return [StepBatch(main.name, main.groups, [*main.terms, term], main.pairs)]
