"""The union of two vocabularies: every token once, and logits where they belong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dpkd.cross_tokenizer.retokenize import TextTokenizer
from dpkd.cross_tokenizer.union_vocabulary import unite
from dpkd.errors import DpkdError
from dpkd.models.loading import load_tokenizer
from dpkd.models.settings import ModelSettings


def test_equal_vocabularies_are_their_own_union(tokenizer_of: Any) -> None:
    one = TextTokenizer(tokenizer_of())
    union = unite(one, one, 300, 300)
    assert (union.student, union.teacher, union.shared, union.size) == (257, 257, 257, 257)
    assert union.place.tolist() == list(range(257))


def test_tokens_of_one_side_stand_apart(tokenizer_of: Any) -> None:
    """Student: bytes, ov, <eos>. Teacher: bytes, ov, ve, <end> as its EOS, <eos> as a token of another meaning."""
    own = TextTokenizer(tokenizer_of(merges=(("o", "v"),)))
    other = TextTokenizer(tokenizer_of("<end>", merges=(("o", "v"), ("v", "e")), eos_token="<end>"))
    union = unite(own, other, 300, 300)
    ids, theirs = own.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    place = union.place.tolist()
    assert place[theirs["ov"]] == ids["ov"]
    assert place[theirs["<end>"]] == ids["<eos>"]
    assert sorted(place[theirs[name]] for name in ("ve", "<eos>")) == [258, 259]
    assert (union.student, union.teacher, union.size, union.shared) == (258, 260, 260, 258)
    assert len(set(place)) == 260
    assert union.sentence() == "258 of the teacher's 260 tokens are among the student's 258"


def test_logits_over_the_union(tokenizer_of: Any) -> None:
    own = TextTokenizer(tokenizer_of(merges=(("o", "v"),)))
    other = TextTokenizer(tokenizer_of(merges=(("v", "e"),)))
    union = unite(own, other, 258, 258)
    assert union.size == 259
    student, teacher = torch.randn(2, 258), torch.randn(2, 258)
    wide_q, wide_p = union.of_student(student), union.of_teacher(teacher)
    assert wide_q.shape == wide_p.shape == (2, 259)
    torch.testing.assert_close(wide_q[:, :258], student)
    assert (wide_q[:, 258] == -math.inf).all()
    torch.testing.assert_close(wide_p[:, union.place], teacher)
    assert (wide_p[:, own.tokenizer.get_vocab()["ov"]] == -math.inf).all()
    torch.testing.assert_close(wide_p.softmax(-1).sum(-1), torch.ones(2))


def test_real_vocabularies_match_by_what_tokens_spell(shared_model: Any) -> None:
    stories, dreams = (
        TextTokenizer(load_tokenizer(ModelSettings(model=shared_model(n)))) for n in ("stories260K", "aidreams260K")
    )
    union = unite(stories, dreams, 512, 512)
    for number, place in enumerate(union.place.tolist()):
        if place < 512:
            assert stories.pieces[place] == dreams.pieces[number]
    common = {p for p in stories.pieces if p} & {p for p in dreams.pieces if p}
    matched = {stories.pieces[place] for place in union.place.tolist() if place < 512}
    assert matched - {None} == common
    assert len(common) > 100


def test_a_byte_gives_way_to_the_letter_that_it_spells() -> None:
    """`<0x41>` and `A` spell the same: a byte-level teacher's `A` is the student's letter, not its byte."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"The old dog,13cats:.Aé"]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(n for n in names if n != " "))}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    model.normalizer = normalizers.Replace(" ", "▁")
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    own = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>"))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    level = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<eos>"])}, merges=[]))
    level.pre_tokenizer, level.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    other = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=level, eos_token="<eos>"))
    place = unite(own, other, 300, 300).place.tolist()
    theirs = other.tokenizer.get_vocab()
    assert place[theirs["A"]] == vocab["A"]
    assert place[theirs["Ġ"]] == vocab["▁"]
    assert place[theirs["Ã"]] == vocab["<0xC3>"]


@pytest.mark.parametrize(("rows", "who"), [((256, 300), "student"), ((300, 256), "teacher")])
def test_a_head_that_is_too_small_is_an_error(tokenizer_of: Any, rows: tuple[int, int], who: str) -> None:
    one = TextTokenizer(tokenizer_of())
    with pytest.raises(DpkdError, match=f"the {who}'s tokenizer uses ids up to 256, but its output head has only 256"):
        unite(one, one, *rows)
