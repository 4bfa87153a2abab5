"""Which ids two models share: verified, and never taken from the sizes alone."""

from __future__ import annotations

from typing import Any

import pytest

from dpkd.errors import DpkdError
from dpkd.models.loading import load_tokenizer
from dpkd.models.settings import ModelSettings
from dpkd.models.tokenizers import SharedVocabulary, shared_vocabulary, tokenizer_fingerprint

IDS = 257  # 256 bytes and <eos>


@pytest.mark.parametrize(("student", "teacher"), [(IDS, IDS), (320, 320)])
def test_equal_heads_are_compared_whole(tokenizer_of: Any, student: int, teacher: int) -> None:
    assert shared_vocabulary(tokenizer_of(), tokenizer_of(), student, teacher) == SharedVocabulary(student)


@pytest.mark.parametrize(("student", "teacher"), [(IDS, 320), (320, IDS), (272, 320), (320, 272)])
def test_padded_heads_are_cut_to_the_ids_of_the_tokenizer(tokenizer_of: Any, student: int, teacher: int) -> None:
    shared = shared_vocabulary(tokenizer_of(), tokenizer_of(), student, teacher)
    assert shared.size == IDS
    for number in (student, teacher, IDS):
        assert str(number) in str(shared.note)


@pytest.mark.parametrize(
    ("student", "teacher", "who"), [(256, 320, "student"), (320, 256, "teacher"), (256, 256, "student")]
)
def test_a_head_smaller_than_the_tokenizer_is_an_error(tokenizer_of: Any, student: int, teacher: int, who: str) -> None:
    with pytest.raises(DpkdError, match=f"ids up to 256, but the {who}'s output head has only 256 rows"):
        shared_vocabulary(tokenizer_of(), tokenizer_of(), student, teacher)


def test_another_vocabulary_is_refused_and_the_first_token_named(tokenizer_of: Any) -> None:
    own, other = tokenizer_of("<a>", "<b>"), tokenizer_of("<a>", "<c>")
    with pytest.raises(
        DpkdError, match=r"259 tokens .* 259; the token '<b>' is 258 for the student and absent for the"
    ):
        shared_vocabulary(own, other, 300, 300)


def test_an_added_token_is_a_difference(tokenizer_of: Any) -> None:
    with pytest.raises(
        DpkdError, match=r"'<pad>' is absent for the student and 257 for the teacher.*student.init=layers"
    ):
        shared_vocabulary(tokenizer_of(), tokenizer_of("<pad>"), 300, 300)


def test_the_same_tokens_encoded_differently_are_refused(tokenizer_of: Any) -> None:
    # Merges in another order: one vocabulary, but `over` of the first probe is split in other places.
    merges = (("o", "v"), ("v", "e"))
    own, other = tokenizer_of(merges=merges), tokenizer_of(merges=merges[::-1])
    assert own.get_vocab() == other.get_vocab()
    with pytest.raises(DpkdError, match=r"encode the text 'The quick .* from token 26 on: 'ov' .* and 'o' for"):
        shared_vocabulary(own, other, 300, 300)


def test_another_eos_is_refused_with_the_way_out(tokenizer_of: Any) -> None:
    own, other = tokenizer_of("<end>"), tokenizer_of("<end>", eos_token="<end>")
    with pytest.raises(
        DpkdError, match=r"eos_token_id is 256 for the student and 257 for the teacher.*teacher\.tokenizer"
    ):
        shared_vocabulary(own, other, 300, 300)


def test_pad_token_makes_no_difference(tokenizer_of: Any) -> None:
    padded = tokenizer_of()
    padded.pad_token = padded.eos_token
    assert shared_vocabulary(tokenizer_of(), padded, 300, 300).size == 300
    assert tokenizer_fingerprint(padded) == tokenizer_fingerprint(tokenizer_of())


def test_fingerprint_changes_with_tokens_merges_and_eos(tokenizer_of: Any) -> None:
    merges = (("o", "v"), ("v", "e"))
    kinds = [
        tokenizer_of(),
        tokenizer_of("<end>"),
        tokenizer_of("<end>", eos_token="<end>"),
        tokenizer_of(merges=merges),
        tokenizer_of(merges=merges[::-1]),
    ]
    assert len({tokenizer_fingerprint(t) for t in kinds}) == len(kinds)


def test_real_models_of_one_size_with_other_tokenizers_are_refused(shared_model: Any) -> None:
    stories, dreams = (load_tokenizer(ModelSettings(model=shared_model(n))) for n in ("stories260K", "aidreams260K"))
    assert len(stories.get_vocab()) == len(dreams.get_vocab()) == 512
    assert shared_vocabulary(stories, stories, 512, 512).size == 512
    with pytest.raises(DpkdError, match="different tokenizers: the student's has 512 tokens and the teacher's 512"):
        shared_vocabulary(stories, dreams, 512, 512)
