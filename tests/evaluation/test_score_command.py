"""`dpkd score` as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dpkd.cli.score import score
from dpkd.errors import DpkdError, SettingsError


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    predictions, references = tmp_path / "p.jsonl", tmp_path / "r.jsonl"
    predictions.write_text('{"text": "The cat sat."}\n{"text": "no"}\n')
    references.write_text('{"output": "the cat sat"}\n{"output": ["a b c d", "yes"]}\n')
    return str(predictions), str(references)


def call(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(score)
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_table_says_the_unit_and_the_scores(files: tuple[str, str]) -> None:
    lines = call(*files, "--cuts", "3").splitlines()
    assert any("reference length (words)" in line for line in lines)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert cells == [["(0,3]", "1", "100.00", "100.00"], ["(3,∞)", "1", "0.00", "0.00"], ["all", "2", "50.00", "50.00"]]
    assert any("2.00 words on average" in line for line in lines)


def test_json(files: tuple[str, str]) -> None:
    found = json.loads(call(*files, "--json"))
    assert (found["rows"], found["rouge_l"], found["exact_match"]) == (2, 50.0, 50.0)
    assert found["length_buckets"]["cuts"] == [30, 70]
    assert json.loads(call(*files, "--json", "--cuts", ""))["length_buckets"]["buckets"] == []


def test_references_may_be_inside_the_predictions(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prediction": "a", "references": ["b", "a"]}\n')
    assert json.loads(call(str(path), "--json"))["exact_match"] == 100


def saved_tokenizer(folder: Path) -> str:
    """A tokenizer of letters, which begins each text with a special token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({"<s>": 0, "?": 1}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", model_max_length=5)
    assert len(tokenizer("ab").input_ids) == 3
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_lengths_in_tokens_leave_special_tokens_out(files: tuple[str, str], tmp_path: Path) -> None:
    options = ["--unit", "tokens", "--tokenizer", saved_tokenizer(tmp_path / "letters")]
    found = json.loads(call(*files, "--json", "--cuts", "7,11", *options))
    assert found["length_buckets"]["unit"] == "tokens"
    assert [b["rows"] for b in found["length_buckets"]["buckets"]] == [1, 1, 0]  # 7 and 11 letters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--unit", "tokens"], "--unit tokens needs --tokenizer FOLDER"),
        (["--tokenizer", "x"], "--tokenizer x is used only with --unit tokens"),
        (["--cuts", "30,x"], "--cuts '30,x': expected whole numbers"),
        (["--cuts", "70,30"], "length cuts 70,30"),
    ],
)
def test_options_that_do_not_fit(options: list[str], message: str, files: tuple[str, str]) -> None:
    with pytest.raises(SettingsError, match=message):
        call(*files, *options)


def test_a_folder_without_a_tokenizer_is_named(files: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(DpkdError, match="found no such folder"):
        call(*files, "--unit", "tokens", "--tokenizer", str(tmp_path / "absent"))
    with pytest.raises(DpkdError, match="no tokenizer could be loaded"):
        call(*files, "--unit", "tokens", "--tokenizer", str(tmp_path))


def test_importing_the_command_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "nltk", "numpy")
    code = f"import sys, dpkd.cli.score; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
