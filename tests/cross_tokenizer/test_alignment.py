"""Two cuts of one text: spans cover it, in order, with the same bytes on both sides, and none could be shorter."""

from __future__ import annotations

from itertools import accumulate, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from dpkd.cross_tokenizer.retokenize import Span, align


@st.composite
def cut_twice(draw):
    """A text in bytes, and two ways to cut it into pieces; some pieces are empty."""
    text = draw(st.text(max_size=30)).encode()

    def cut():
        edges = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
        bounds = [0, *edges, len(text)]
        return [text[a:b] for a, b in pairwise(bounds)]

    return text, cut(), cut()


def boundaries(pieces):
    return set(accumulate(map(len, pieces)))


@settings(max_examples=300, deadline=None)
@given(cut_twice())
def test_spans_cover_the_text_at_every_common_boundary(case):
    text, own, other = case
    spans = align(own, other)
    spelt = [
        (b"".join(own[s.student_start : s.student_stop]), b"".join(other[s.teacher_start : s.teacher_stop]))
        for s in spans
    ]
    assert all(a == b for a, b in spelt)
    assert all(spelt)
    assert b"".join(a for a, _ in spelt) == text
    # Brute force: a span ends wherever both have a boundary.
    assert set(accumulate(len(a) for a, _ in spelt)) == (boundaries(own) & boundaries(other)) - {0}
    for before, after in pairwise([Span(0, 0, 0, 0), *spans]):
        assert (before.student_stop, before.teacher_stop) == (after.student_start, after.teacher_start)


@settings(max_examples=100, deadline=None)
@given(cut_twice(), cut_twice())
def test_it_ends_where_the_texts_begin_to_differ(one, two):
    spans = align(one[1], two[2])
    a, b = b"".join(one[1]), b"".join(two[2])
    for s in spans:
        ends = len(b"".join(one[1][: s.student_stop])), len(b"".join(two[2][: s.teacher_stop]))
        assert ends[0] == ends[1]
        assert a[: ends[0]] == b[: ends[0]]


def test_a_token_that_is_no_text_ends_it():
    assert align([b"a", None, b"b"], [b"a", b"b"]) == [Span(0, 1, 0, 1)]
    assert align([b"a", b"b"], [None, b"a", b"b"]) == []


def test_characters_may_be_cut_by_both():
    """Two byte-level tokenizers may agree inside a character."""
    assert align([b"\xe6", b"\x9d\xb1"], [b"\xe6", b"\x9d", b"\xb1"]) == [Span(0, 1, 0, 1), Span(1, 2, 1, 3)]


def test_nothing_is_nothing():
    assert align([], []) == align([b"a"], []) == align([], [b""]) == []
