"""What tokens spell, and responses as another tokenizer reads them: byte-level and SentencePiece, built and real."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import REAL, byte_tokenizer, piece_tokenizer, real_tokenizer

from dpkd.cross_tokenizer.retokenize import AlignedSequence, Retokenizer, TextTokenizer, collate_aligned
from dpkd.cross_tokenizer.token_text import spelled, token_pieces
from dpkd.data.batches import TokenSequence, collate
from dpkd.data.encode import Prompt
from dpkd.data.encoding import encode_continuations
from dpkd.errors import DpkdError

TEXTS = [
    "Once upon a time, there was a cat.",
    " a leading space",
    "two  spaces\n\nand a tab\t!",
    "naïve café — 12,345.67 €",
    "東京は日本の首都です。 Привет 🙂🙂",
    "x",
    "é",
    "",
]
BUILT = {"bytes": byte_tokenizer, "pieces": piece_tokenizer}
PAIRS = [(a, b) for a in (*BUILT, *REAL) for b in (*BUILT, *REAL)]


@cache
def dialect(name: str) -> TextTokenizer:
    return TextTokenizer(BUILT[name]() if name in BUILT else real_tokenizer(name))


def retokenizer(student: str, teacher: str, longest: int | None = None) -> Retokenizer:
    own = dialect(student)
    other = own if student == teacher else dialect(teacher)
    return Retokenizer(own, other, [Prompt("p", (1, 2, 3), (), (), "")], longest)


def check(aligned: AlignedSequence, ids: list[int], t: Retokenizer) -> None:
    """Spans are in order, without a gap, and spell the same on both sides."""
    own, other = t.student.pieces_of(ids), t.teacher.pieces_of(aligned.sequence.response_ids)
    at = (0, 0)
    for s in aligned.spans:
        assert (s.student_start, s.teacher_start) == at
        at = (s.student_stop, s.teacher_stop)
        a, b = own[s.student_start : s.student_stop], other[s.teacher_start : s.teacher_stop]
        assert a == b == [None] or b"".join(a) == b"".join(b) != b""


@pytest.mark.parametrize("name", [*BUILT, *REAL])
def test_tokens_spell_the_text(name: str) -> None:
    own = dialect(name)
    for text, ids in zip(TEXTS, own.encode(TEXTS), strict=True):
        assert spelled(own.pieces, ids) == text.encode()
        assert own.text(ids) == text


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_whole_responses_are_covered_to_their_end(student: str, teacher: str) -> None:
    t = retokenizer(student, teacher)
    responses = [[*ids, t.student.eos_id] for ids in t.student.encode(TEXTS)]
    for text, ids, aligned in zip(TEXTS, responses, t.aligned([(0, ids) for ids in responses]), strict=True):
        check(aligned, ids, t)
        assert aligned.sequence.prompt_ids == (1, 2, 3)
        assert t.teacher.text(aligned.sequence.response_ids) == text
        assert aligned.sequence.response_ids[-1] == t.teacher.eos_id
        assert aligned.spans[-1].student_stop == len(ids)
        assert aligned.spans[-1].teacher_stop == len(aligned.sequence.response_ids)
        if student == teacher:
            assert list(aligned.sequence.response_ids) == ids
            assert len(aligned.spans) == len(ids)


@pytest.mark.parametrize(("student", "teacher"), [("bytes", "pieces"), ("pieces", "bytes"), ("gpt2", "stories260K")])
def test_whatever_a_student_draws_has_a_twin(student: str, teacher: str) -> None:
    """Any ids at all: broken characters, special tokens, an EOS inside."""
    t = retokenizer(student, teacher)
    count = len(t.student.pieces)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, count + 2), max_size=12))
    def holds(ids: list[int]) -> None:
        (aligned,) = t.aligned([(0, ids)])
        check(aligned, ids, t)

    holds()


def test_a_response_without_eos_has_none_for_the_teacher() -> None:
    t = retokenizer("bytes", "pieces")
    (ids,) = t.student.encode(["abc"])
    (aligned,) = t.aligned([(0, ids)])
    assert len(aligned.spans) == 3
    assert t.teacher.eos_id not in aligned.sequence.response_ids


def test_text_that_breaks_off_is_aligned_up_to_there() -> None:
    t = retokenizer("bytes", "pieces")
    (ids,) = t.student.encode(["abé"])
    broken = [*ids[:-1], t.student.eos_id]  # half of the é, then the end
    (aligned,) = t.aligned([(0, broken)])
    assert [s.student_stop for s in aligned.spans] == [1, 2]
    assert t.teacher.text(aligned.sequence.response_ids) == "ab"
    assert t.teacher.eos_id not in aligned.sequence.response_ids


def test_a_teacher_that_reads_less_gets_less() -> None:
    t = retokenizer("pieces", "bytes", longest=6)
    (ids,) = encode_continuations(t.student.tokenizer, ["abcdef"])
    (aligned,) = t.aligned([(0, [*ids, t.student.eos_id])])
    assert len(aligned.sequence.response_ids) == 3
    assert [s.student_stop for s in aligned.spans] == [1, 2, 3]


def test_rows_of_a_batch_by_span() -> None:
    """By hand: two responses; the rows are those of `collate`, which predict each token."""
    t = retokenizer("bytes", "pieces")
    responses = [[*ids, t.student.eos_id] for ids in t.student.encode(["aé", "b"])]
    aligned = t.aligned([(0, ids) for ids in responses])
    sequences = [TokenSequence((9,), ids) for ids in responses]
    made, own = collate_aligned(sequences, aligned, pad_id=0), collate(sequences, pad_id=0)
    # Student: a | C3 A9 | eos | b | eos; the teacher has the same, for it spells é in bytes as well.
    assert made.student.first.tolist() == [0, 1, 2, 3, 4, 5]
    t = retokenizer("gpt2", "pieces")
    responses = [[*ids, t.student.eos_id] for ids in t.student.encode([" the é", "b"])]
    aligned = t.aligned([(0, ids) for ids in responses])
    sequences = [TokenSequence((9,), ids) for ids in responses]
    made, own = collate_aligned(sequences, aligned, pad_id=0), collate(sequences, pad_id=0)
    # Student: " the" | " é" | eos | "b" | eos. Teacher: ▁ t h e | ▁ C3 A9 | eos | b | eos.
    assert made.student.first.tolist() == [0, 1, 2, 3, 4]
    assert made.student.rest.tolist() == []
    assert made.teacher.first.tolist() == [0, 4, 7, 8, 9]
    assert made.teacher.rest.tolist() == [1, 2, 3, 5, 6]
    assert made.teacher.span.tolist() == [0, 0, 0, 1, 1]
    assert own.targets[made.student.first].tolist() == [i for ids in responses for i in ids]
    assert made.batch.targets[made.teacher.first[2]].item() == t.teacher.eos_id


def test_chunks_begin_where_no_span_is_cut() -> None:
    t = retokenizer("pieces", "gpt2")
    responses = [[*ids, t.student.eos_id] for ids in t.student.encode([" the cat", " a"])]
    sequences = [TokenSequence((9,), ids) for ids in responses]
    rows = collate_aligned(sequences, t.aligned([(0, ids) for ids in responses]), pad_id=0).student
    # ▁ t h e | ▁ c a t | eos | ▁ a | eos
    assert rows.starts(12) == [0, 4, 8, 9, 11]
    chunk = rows.within(slice(4, 9))
    assert chunk.spans == slice(1, 3)
    assert chunk.first.tolist() == [0, 4]
    assert chunk.rest.tolist() == [1, 2, 3]
    assert chunk.span.tolist() == [0, 0, 0]


def test_a_tokenizer_that_does_not_spell_is_refused() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordPiece(vocab={"[UNK]": 0, "a": 1, "##b": 2, "</s>": 3}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>")
    with pytest.raises(DpkdError, match=r"cannot be aligned with another: its decoder is WordPiece\. Known are byte"):
        token_pieces(tokenizer)


def test_a_tokenizer_that_changes_the_text_is_refused() -> None:
    from tokenizers import normalizers

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(DpkdError, match="its tokens of 'The old dog"):
        token_pieces(tokenizer)
