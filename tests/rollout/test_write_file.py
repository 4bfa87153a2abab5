"""What `dpkd sample` writes is, token for token, what training on the file reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dpkd.api import Sampled, SamplingSettings
from dpkd.data.encode import tokenize
from dpkd.data.examples import read_examples
from dpkd.data.settings import DataSettings
from dpkd.errors import DpkdError
from dpkd.models.settings import ModelSettings
from dpkd.plugins import Registry
from dpkd.rollout import sample_file as write_file

WORDS = ["once", "upon", "a", "time", "the", "cat", "sat", "down", "and", "slept"]
SAMPLING = SamplingSettings(max_new_tokens=6)


def _tokenizer():
    """Like SentencePiece: a space before each word is part of it, and decoding drops that of the first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [
        "<unk>",
        "<eos>",
        *(f"▁{word}" for word in WORDS),
        *WORDS,
        "▁",
        "\n",
        "\u2028",
        *"#:Instrucionp.Rdabcqwelhkmgtv",
    ]
    scores = [(piece, -1.0 * (1 + len(pieces) - len(piece))) for piece in dict.fromkeys(pieces)]
    model = Tokenizer(models.Unigram(scores, unk_id=0))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    model.decoder = decoders.Metaspace(prepend_scheme="first")
    model.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")


class Answers:
    """A sampler with one answer to everything."""

    def __init__(self, ids: list[int]) -> None:
        self.answer = Sampled(tuple(ids), torch.empty(0), torch.empty(0), False)

    def refresh(self) -> None: ...

    def close(self) -> None: ...

    def draw(self, task):
        return [self.answer for _ in task.seeds]


def _model(tokenizer):
    """A model as far as the file's writer looks at it: as many embeddings as the tokenizer has ids."""
    model = torch.nn.Identity()
    model.get_input_embeddings = lambda: torch.nn.Embedding(len(tokenizer), 1)
    return model


@pytest.fixture
def written(tmp_path: Path, monkeypatch):
    """`written(row, ids, ...)`: the file that a model which answers `ids` writes, and the tokenizer."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(16))

    def make(row: dict[str, object], ids: list[int], tokenizer, **data):
        (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
        output = tmp_path / "out.jsonl"
        monkeypatch.setattr(write_file, "load_tokenizer", lambda settings: tokenizer)
        monkeypatch.setattr(write_file, "load_model", lambda *a, **k: _model(tokenizer))
        monkeypatch.setattr(write_file, "open_sampler", lambda registry, name, settings, writer: Answers(ids))
        settings = DataSettings(path=str(tmp_path / "prompts.jsonl"), **data)
        report = write_file.sample_to_file(
            ModelSettings(model=str(folder)), settings, SAMPLING, registry=Registry(), output=output, seed=1
        )
        return output, report

    return make


@pytest.mark.parametrize(
    "answer", [[" cat", " sat"], ["cat", " sat"], [" cat", "\n", "sat"], [" cat", "\u2028", "sat"]]
)
@pytest.mark.parametrize("row", [{"prompt": "once upon a time"}, {"instruction": "once upon a time"}])
def test_the_file_is_read_as_what_was_drawn(row, answer, written):
    tokenizer = _tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(piece.replace(" ", "▁")) for piece in answer]
    assert tokenizer.unk_token_id not in ids
    output, _ = written(row, [*ids, tokenizer.eos_token_id], tokenizer)
    data = DataSettings(path=str(output))
    (prompt,) = tokenize(read_examples(data).examples, tokenizer, data).prompts
    assert list(prompt.response_ids) == [*ids, tokenizer.eos_token_id]


def test_a_file_of_other_prompts_is_not_continued(written):
    tokenizer = _tokenizer()
    written({"prompt": "once upon a time"}, [5, 1], tokenizer)
    _, report = written({"prompt": "once upon a time"}, [5, 1], tokenizer)
    assert (report.written, report.found) == (0, 1)
    with pytest.raises(DpkdError, match=r"for other prompts or with other settings: data \("):
        written({"prompt": "the cat"}, [5, 1], tokenizer)


def test_rows_without_a_response_are_noted(written):
    tokenizer = _tokenizer()
    (_, report) = written({"prompt": "once upon a time"}, [1], tokenizer)
    assert (report.written, report.empty) == (1, 1)
