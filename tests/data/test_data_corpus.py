"""Plain text to blocks."""

from __future__ import annotations

import pytest

from dpkd.data.corpus import read_corpus
from dpkd.data.settings import CorpusSettings
from dpkd.errors import DpkdError


def blocks_as_text(corpus, tokenizer) -> list[str]:
    return [tokenizer.decode(block, clean_up_tokenization_spaces=False) for block in corpus]


def test_documents_are_joined_with_eos_and_cut(tmp_path, byte_level):
    path = tmp_path / "x.txt"
    path.write_bytes(b"abc\r\n\n  \nd\nefgh\nij")
    corpus = read_corpus(CorpusSettings(path=str(path), max_tokens=4), byte_level)
    assert blocks_as_text(corpus, byte_level) == ["abc<eos>", "d<eos>ef", "gh<eos>i"]
    assert (corpus.documents, corpus.left_over, len(corpus)) == (4, 2, 3)
    assert corpus.sentence() == f"{path}: 4 documents, 3 blocks of 4 tokens"
    assert corpus[-1] == corpus[2] == list(corpus)[2] == corpus[1:][1]
    with pytest.raises(IndexError):
        corpus[3]
    assert len(read_corpus(CorpusSettings(path=str(path), max_tokens=4, limit=1), byte_level)) == 1


def test_an_eos_that_stands_in_a_text_ends_no_document(tmp_path, byte_level):
    path = tmp_path / "x.txt"
    path.write_text("a<eos>bc")
    corpus = read_corpus(CorpusSettings(path=str(path), max_tokens=8), byte_level)
    assert blocks_as_text(corpus, byte_level) == ["a<eos>bc"]
    assert byte_level.eos_token_id not in corpus[0]
    assert corpus.left_over == 1  # the real one


def test_jsonl_with_a_column(byte_level, jsonl):
    path = jsonl({"body": "é\n日本"}, {"body": ""}, {"body": "x"})
    corpus = read_corpus(CorpusSettings(path=path, column="body", max_tokens=12), byte_level)
    assert blocks_as_text(corpus, byte_level) == ["é\n日本<eos>x<eos>"]


def test_the_fingerprint_is_of_the_blocks(byte_level, jsonl):
    def one(*texts, size=2):
        path = jsonl(*[{"text": text} for text in texts])
        return read_corpus(CorpusSettings(path=path, max_tokens=size), byte_level).fingerprint

    assert one("ab", "c") == one("ab", "", "c")
    assert len({one("ab", "c"), one("ac", "c"), one("abc"), one("ab", "c", size=3)}) == 4


def problem(tokenizer, path, **settings) -> str:
    with pytest.raises(DpkdError) as caught:
        read_corpus(CorpusSettings(path=str(path), **settings), tokenizer)
    return str(caught.value)


def test_errors(tmp_path, byte_level, jsonl):
    path = jsonl({"text": "abc"}, {"text": 3}, b"{", {"body": "x"})
    assert problem(byte_level, path, max_tokens=2) == (
        f"terms.pretrain.corpus.path: rows of {path} cannot be read (column `text`; set "
        "terms.pretrain.corpus.column for another):\n"
        "  data.jsonl:2: wrong type: `text` is a number (3), expected text\n"
        "  data.jsonl:3: not JSON: Expecting property name enclosed in double quotes at column 2\n"
        "  data.jsonl:4: missing field: `text` is not there"
    )
    (tmp_path / "latin.txt").write_bytes(b"abc\ncaf\xe9\n")
    assert problem(byte_level, tmp_path / "latin.txt").endswith(
        ":\n  latin.txt:2: not UTF-8: byte 0xe9 at byte 4 of the line"
    )
    (tmp_path / "short.txt").write_text("abc")
    assert problem(byte_level, tmp_path / "short.txt") == (
        f"terms.pretrain.corpus.path: {tmp_path}/short.txt has 4 tokens in 1 documents, less than one block "
        "of 512. Use more text, or lower terms.pretrain.corpus.max_tokens."
    )
    assert problem(byte_level, tmp_path / "shrot.txt") == (
        f"terms.pretrain.corpus.path: there is no file {tmp_path}/shrot.txt. Did you mean {tmp_path}/short.txt?"
    )


def test_real_text(any_tokenizer, shared):
    path = shared / "plain_wikipedia.txt"
    corpus = read_corpus(CorpusSettings(path=str(path), max_tokens=64, limit=3), any_tokenizer)
    assert {len(block) for block in corpus} == {64}
    ids = [token for block in corpus for token in block]
    first = path.read_text(encoding="utf-8").split("\n")[0]
    end = ids.index(any_tokenizer.eos_token_id)
    assert any_tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False) == first
