"""Two vocabularies as one: the student's tokens, then those that only the teacher has.

Shapes: n rows, V student tokens, T teacher tokens, U tokens of the union.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkd.cross_tokenizer.retokenize import TextTokenizer
from dpkd.cross_tokenizer.token_text import BYTE
from dpkd.errors import DpkdError


@dataclass(frozen=True)
class UnionVocabulary:
    """Where the tokens of both models stand in the union; a model gives no mass to a token that it does not have.

    student  V
    place    [T] the union's id of each of the teacher's tokens
    size     U
    """

    student: int
    place: Tensor
    size: int

    @property
    def teacher(self) -> int:
        """T."""
        return len(self.place)

    @property
    def shared(self) -> int:
        """Tokens that both have."""
        return self.student + self.teacher - self.size

    def of_student(self, logits_nV: Tensor) -> Tensor:
        """Logits `[n, U]`, -inf for tokens that only the teacher has."""
        return F.pad(logits_nV, (0, self.size - self.student), value=-math.inf)

    def of_teacher(self, logits_nT: Tensor) -> Tensor:
        """Logits `[n, U]`, -inf for tokens that only the student has."""
        union_nU = logits_nT.new_full((len(logits_nT), self.size), -math.inf)
        return union_nU.index_copy_(1, self.place, logits_nT)

    def to(self, device: torch.device) -> UnionVocabulary:
        """The same on another device."""
        return UnionVocabulary(self.student, self.place.to(device), self.size)

    def sentence(self) -> str:
        """For people: how much the two have in common."""
        return f"{self.shared:,} of the teacher's {self.teacher:,} tokens are among the student's {self.student:,}"


def unite(student: TextTokenizer, teacher: TextTokenizer, student_rows: int, teacher_rows: int) -> UnionVocabulary:
    """The union of two vocabularies; tokens are the same where they spell the same, and EOS is EOS.

    A token that spells what another of its vocabulary spells (a byte `<0x41>` beside `A`) is matched by name.
    Raises DpkdError where an output head has fewer rows than its tokenizer has ids.
    """
    own, other = len(student.pieces), len(teacher.pieces)
    for who, ids, rows in (("student", own, student_rows), ("teacher", other, teacher_rows)):
        if ids > rows:
            raise DpkdError(
                f"the {who}'s tokenizer uses ids up to {ids - 1:,}, but its output head has only {rows:,} rows: "
                "model and tokenizer do not belong together"
            )
    matches = _matches(student, teacher)
    place, size = [], own
    for number in range(other):
        if number in matches:
            place.append(matches[number])
        else:
            place.append(size)
            size += 1
    return UnionVocabulary(own, torch.tensor(place, dtype=torch.long), size)


def _matches(student: TextTokenizer, teacher: TextTokenizer) -> dict[int, int]:
    """The student's id for each of the teacher's that has one."""
    matches: dict[int, int] = {}
    taken: set[int] = set()

    def match(number: int, other: int) -> None:
        if number not in matches and other not in taken:
            matches[number] = other
            taken.add(other)

    match(teacher.eos_id, student.eos_id)
    by_name: Mapping[str, int] = student.tokenizer.get_vocab()
    for name, number in teacher.tokenizer.get_vocab().items():
        if name in by_name and student.pieces[by_name[name]] == teacher.pieces[number]:
            match(number, by_name[name])
    by_piece = _by_piece(student)
    for piece, number in _by_piece(teacher).items():
        if piece in by_piece:
            match(number, by_piece[piece])
    return matches


def _by_piece(dialect: TextTokenizer) -> dict[bytes, int]:
    """The id of each text; a byte `<0x41>` only where no other token spells it."""
    vocabulary = dialect.tokenizer.get_vocab()
    ordered = sorted(vocabulary.items(), key=lambda item: BYTE.fullmatch(item[0]) is None)
    return {piece: number for _, number in ordered if (piece := dialect.pieces[number])}
