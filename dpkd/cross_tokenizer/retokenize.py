"""Responses of one tokenizer as another reads them: the same text in its own tokens, and the aligned spans.

Shapes: N response tokens of a batch, S spans, R tokens of spans after their first.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dpkd.cross_tokenizer.token_text import spelled, token_pieces
from dpkd.data.batches import Batch, TokenSequence, collate
from dpkd.data.encoding import encode_continuations, require_eos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpkd.data.encode import Prompt


Piece = bytes | None  # what a token spells; None: nothing that is text


class Span(NamedTuple):
    """Tokens of student and teacher, each from start up to stop, that spell the same bytes."""

    student_start: int
    student_stop: int
    teacher_start: int
    teacher_stop: int


def align(student: Sequence[Piece], teacher: Sequence[Piece]) -> list[Span]:
    """The shortest spans that both tokenizations delimit, in order and without a gap, from the start of the text.

    They end where the texts begin to differ, where one runs out, or at a token that is no text.

    >>> align([b"Once", b" up", b"on"], [b"On", b"ce", b" upon"])
    [Span(student_start=0, student_stop=1, teacher_start=0, teacher_stop=2), \
Span(student_start=1, student_stop=3, teacher_start=2, teacher_stop=3)]
    """
    spans: list[Span] = []
    own, other = bytearray(), bytearray()
    i = j = start_i = start_j = 0
    while True:
        behind = len(own) <= len(other)
        piece = _at(student, i) if behind else _at(teacher, j)
        if piece is None:
            return spans
        if behind:
            own += piece
            i += 1
        else:
            other += piece
            j += 1
        if own and len(own) == len(other):
            if own != other:
                return spans
            spans.append(Span(start_i, i, start_j, j))
            start_i, start_j = i, j
            own.clear()
            other.clear()


def _at(pieces: Sequence[Piece], place: int) -> Piece:
    return pieces[place] if place < len(pieces) else None


class AlignedSequence(NamedTuple):
    """A response as the teacher reads it, prompt included, and what both tokenizations have in common."""

    sequence: TokenSequence
    spans: tuple[Span, ...]


# What stands beside the sequence of a process that has nothing to do.
IDLE_ALIGNED = AlignedSequence(TokenSequence((0,), ()), ())


class TextTokenizer:
    """A tokenizer, and what its tokens spell."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises DpkdError when its tokens do not each spell a part of the text."""
        self.tokenizer = tokenizer
        self.pieces = token_pieces(tokenizer)
        self.eos_id = require_eos(tokenizer)

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, up to the first that is no text, or that breaks a character."""
        spelt = spelled(self.pieces, ids)
        try:
            return spelt.decode()
        except UnicodeDecodeError as error:
            return spelt[: error.start].decode()

    def body(self, ids: Sequence[int]) -> Sequence[int]:
        """A response without the EOS at its end."""
        return ids[:-1] if ids and ids[-1] == self.eos_id else ids

    def is_text(self, ids: Sequence[int]) -> bool:
        """Whether `text` tells all of the ids."""
        pieces = self.pieces_of(ids)
        return None not in pieces and len(self.text(ids).encode()) == len(spelled(self.pieces, ids))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that continue a prompt, without EOS."""
        return encode_continuations(self.tokenizer, texts)

    def pieces_of(self, ids: Sequence[int]) -> list[bytes | None]:
        """What each id spells."""
        return [self.pieces[number] if number < len(self.pieces) else None for number in ids]


@dataclass(frozen=True)
class Retokenizer:
    """From the student's tokens to the teacher's, for the prompts of a run.

    prompts  the same prompts in the teacher's tokens, in the same order
    longest  tokens that the teacher reads, None where it does not say
    """

    student: TextTokenizer
    teacher: TextTokenizer
    prompts: Sequence[Prompt]
    longest: int | None

    def aligned(self, responses: Sequence[tuple[int, Sequence[int]]]) -> list[AlignedSequence]:
        """Twins of responses, each given by the number of its prompt and its ids (EOS included, where it has one)."""
        bodies = [self.student.body(ids) for _, ids in responses]
        encoded = self.teacher.encode([self.student.text(body) for body in bodies])
        return [
            self._twin(number, body, theirs, ends=len(body) < len(ids))
            for (number, ids), body, theirs in zip(responses, bodies, encoded, strict=True)
        ]

    def retold(self, responses: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """The teacher's responses in the student's tokens, EOS included where all of the response is text."""
        bodies = [self.teacher.body(ids) for ids in responses]
        encoded = self.student.encode([self.teacher.text(body) for body in bodies])
        return [
            (*own, self.student.eos_id) if len(body) < len(ids) and self.teacher.is_text(body) else tuple(own)
            for ids, body, own in zip(responses, bodies, encoded, strict=True)
        ]

    def _twin(self, number: int, body: Sequence[int], theirs: list[int], *, ends: bool) -> AlignedSequence:
        """The end of the response is a span too, where both have read the whole of it."""
        spans = align(self.student.pieces_of(body), self.teacher.pieces_of(theirs))
        reached = (spans[-1].student_stop, spans[-1].teacher_stop) if spans else (0, 0)
        if ends and reached == (len(body), len(theirs)):
            spans.append(Span(len(body), len(body) + 1, len(theirs), len(theirs) + 1))
            theirs = [*theirs, self.teacher.eos_id]
        prompt_ids = self.prompts[number].prompt_ids
        if self.longest is not None:
            theirs = theirs[: max(0, self.longest - len(prompt_ids))]
        return AlignedSequence(
            TokenSequence(prompt_ids, theirs), tuple(s for s in spans if s.teacher_stop <= len(theirs))
        )


class SpanChunk(NamedTuple):
    """The spans that begin in a chunk of n rows; rows are counted from the start of the chunk, spans from its first."""

    spans: slice
    first: Tensor
    rest: Tensor
    span: Tensor


@dataclass(frozen=True)
class SpanRows:
    """Rows of a batch by span, ascending.

    first  [S] row that predicts the span's first token
    rest   [R] rows that predict its other tokens
    span   [R] the span of each of those
    """

    first: Tensor
    rest: Tensor
    span: Tensor

    def to(self, device: torch.device | str) -> SpanRows:
        """The same rows on another device."""
        return SpanRows(*(rows.to(device, non_blocking=True) for rows in (self.first, self.rest, self.span)))

    @cached_property
    def _lists(self) -> tuple[list[int], list[int]]:
        return self.first.tolist(), self.rest.tolist()

    def starts(self, rows: int) -> list[int]:
        """The rows of `rows` at which a chunk may begin: all but those inside a span."""
        inside = set(self._lists[1])
        return [row for row in range(rows) if row not in inside]

    def within(self, rows: slice) -> SpanChunk:
        """The spans of a chunk that cuts none of them."""
        (lo, hi), (begin, end) = ([bisect_left(x, at) for at in (rows.start, rows.stop)] for x in self._lists)
        return SpanChunk(
            slice(lo, hi), self.first[lo:hi] - rows.start, self.rest[begin:end] - rows.start, self.span[begin:end] - lo
        )


@dataclass(frozen=True)
class AlignedBatch:
    """The teacher's sequences beside a batch of the student's, and the rows of both, span by span."""

    batch: Batch
    student: SpanRows
    teacher: SpanRows

    def to(self, device: torch.device | str) -> AlignedBatch:
        """The same batch on another device."""
        return AlignedBatch(self.batch.to(device), self.student.to(device), self.teacher.to(device))


def collate_aligned(
    sequences: Sequence[TokenSequence], aligned: Sequence[AlignedSequence], *, pad_id: int
) -> AlignedBatch:
    """The aligned of a batch's sequences, in their order; no prompt of either side is empty."""
    own = _span_rows(sequences, [[(s.student_start, s.student_stop) for s in aligned.spans] for aligned in aligned])
    others = [aligned.sequence for aligned in aligned]
    theirs = _span_rows(others, [[(s.teacher_start, s.teacher_stop) for s in aligned.spans] for aligned in aligned])
    return AlignedBatch(collate(others, pad_id=pad_id), own, theirs)


def _span_rows(sequences: Sequence[TokenSequence], spans: Sequence[Sequence[tuple[int, int]]]) -> SpanRows:
    first: list[int] = []
    rest: list[int] = []
    span: list[int] = []
    base = 0
    for sequence, own in zip(sequences, spans, strict=True):
        for start, stop in own:
            rest += range(base + start + 1, base + stop)
            span += [len(first)] * (stop - start - 1)
            first.append(base + start)
        base += len(sequence.response_ids)
    return SpanRows(*(torch.tensor(numbers, dtype=torch.long) for numbers in (first, rest, span)))
