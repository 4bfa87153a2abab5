"""Two tokenizations of one text, cut where both have a boundary: the pieces between are aligned spans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
