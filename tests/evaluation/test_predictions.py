"""Files of predictions and references, ours and other people's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpkd.errors import DpkdError
from dpkd.evaluation.predictions import (
    Prediction,
    References,
    match_references,
    own_references,
    read_predictions,
    read_references,
    write_predictions,
)

any_text = st.text(max_size=12)  # with line separators


@given(rows=st.lists(st.tuples(any_text, st.lists(any_text, max_size=2), any_text), min_size=1, max_size=3))
def test_what_is_written_is_read(rows: list, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("rows") / "predictions.jsonl"
    written = [
        Prediction(text, id=str(i), prompt=prompt, references=tuple(wanted), seed=i, extra={"tokens": 3})
        for i, (text, wanted, prompt) in enumerate(rows)
    ]
    write_predictions(path, written)
    assert read_predictions(path) == written
    assert [p.name for p in path.parent.iterdir()] == ["predictions.jsonl"]


def test_half_a_surrogate_pair_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    write_predictions(path, [Prediction("half \ud83d of it")])
    assert path.read_bytes() == b'{"prediction": "half \\ud83d of it"}\n'
    assert read_predictions(path) == [Prediction("half \ud83d of it")]


def test_fields_without_a_value_are_left_out_and_text_stays_readable(tmp_path: Path) -> None:
    path = tmp_path / "new" / "p.jsonl"
    write_predictions(path, [Prediction("né", extra={"prediction": "shadow", "finished": True})])
    assert path.read_text(encoding="utf-8") == '{"prediction": "né", "finished": true}\n'


@pytest.mark.parametrize("key", ["text", "prediction", "output", "response", "completion", "generated_text"])
def test_answers_of_other_tools(key: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(f'{{"{key}": "one"}}\n\n{{"{key}": ""}}\n', encoding="utf-8")
    assert [row.prediction for row in read_predictions(path)] == ["one", ""]
    assert [row.where for row in read_predictions(path)] == [f"{path}:1", f"{path}:3"]


def test_plain_text_keeps_empty_lines_and_splits_at_line_feeds_only(tmp_path: Path) -> None:
    path = tmp_path / "answers.txt"
    path.write_bytes("\ufeffone\u2028more\r\n\n{}\n".encode())
    assert [row.prediction for row in read_predictions(path)] == ["one\u2028more", "", "{}"]
    assert [row.texts for row in read_references(path)] == [("one\u2028more",), ("",), ("{}",)]


def test_a_file_without_a_known_name_is_judged_by_its_first_line(tmp_path: Path) -> None:
    (tmp_path / "a.out").write_text('{"text": "x"}\n')
    (tmp_path / "b.out").write_text("{not json}\n")
    assert [row.prediction for row in read_predictions(tmp_path / "a.out")] == ["x"]
    assert [row.prediction for row in read_predictions(tmp_path / "b.out")] == ["{not json}"]


def test_an_array_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    path.write_text('[{"response": "x"},\n "y"]')
    assert [(row.prediction, row.where) for row in read_predictions(path)] == [
        ("x", f"{path}, row 1"),
        ("y", f"{path}, row 2"),
    ]


def test_references_are_texts_or_lists(tmp_path: Path) -> None:
    path = tmp_path / "references.jsonl"
    rows = [
        {"instruction": "i", "input": "", "output": "one"},
        {"output": ["one", "two"]},
        {"references": ["r"], "output": "not this"},
        "bare",
        ["a", "b"],
        {"answer": "x", "id": 7},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_references(path)
    assert [row.texts for row in found] == [("one",), ("one", "two"), ("r",), ("bare",), ("a", "b"), ("x",)]
    assert found[-1].id == "7"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": 3}\n', r"p\.jsonl:2: `text`: expected a text, found a number"),
        ('{"text": null}\n', r"p\.jsonl:1: `text`: expected a text, found null"),
        ('{"text": "a"\n', r"p\.jsonl:1: expected one JSON value on this line, but .* at column"),
        ('{"answer": "a"}\n', r"p\.jsonl:1: expected one of `prediction`, .*, found `answer`"),
        ("{}\n", r"found nothing"),
        ('{"output": "a", "response": "b"}\n', r"`output`, `response` could each be the answer\. Rename"),
        ("[1]\n", r"p\.jsonl:1: expected an object or a text, found a list"),
        ('{"text": "a", "seed": "1"}\n', r"`seed`: expected a whole number, found a text"),
        ('{"text": "a", "id": 1.5}\n', r"`id`: expected a text or a whole number"),
        ('{"text": "a", "references": [1]}\n', r"`references`, item 1: expected a text"),
        ("\n", "expected at least one row"),
    ],
)
def test_a_bad_prediction_is_named_by_file_and_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(DpkdError, match=message):
        read_predictions(tmp_path / "p.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"references": []}\n', r"r\.jsonl:1: `references`: .* found an empty list"),
        ('{"output": "a"}\n{"output": [null]}\n', r"r\.jsonl:2: `output`, item 1: expected a text, found null"),
        ('{"instruction": "i"}\n', r"expected one of `references`, .*, found `instruction`"),
        ("3\n", "expected an object or a text, found a number"),
    ],
)
def test_a_bad_reference_is_named_by_file_and_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(content)
    with pytest.raises(DpkdError, match=message):
        read_references(tmp_path / "r.jsonl")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DpkdError, match=r"absent\.jsonl: cannot be read"):
        read_predictions(tmp_path / "absent.jsonl")
    (tmp_path / "latin.txt").write_bytes(b"ok\ncaf\xe9\n")
    with pytest.raises(DpkdError, match=r"latin\.txt:2: expected UTF-8, found the byte 0xe9"):
        read_predictions(tmp_path / "latin.txt")
    (tmp_path / "p.csv").write_text("a\n")
    with pytest.raises(DpkdError, match="expected JSON lines"):
        read_predictions(tmp_path / "p.csv")
    (tmp_path / "p.json").write_text('[{"text": "a"},\n{]')
    with pytest.raises(DpkdError, match=r"p\.json:2: expected an array"):
        read_predictions(tmp_path / "p.json")


def test_rows_match_by_position_without_ids() -> None:
    predictions = [Prediction("a", id="1"), Prediction("b")]
    assert match_references(predictions, [References(("x",)), References(("y",))]) == [("x",), ("y",)]
    with pytest.raises(DpkdError, match=r"2 predictions \(p\.txt\) but 1 rows of references \(r\.jsonl\)"):
        match_references([Prediction("a", where="p.txt:1")] * 2, [References(("x",), where="r.jsonl:1")])


def test_rows_match_by_id_whatever_their_order_and_for_each_seed() -> None:
    references = [References(("x",), "1"), References(("y",), "2")]
    predictions = [Prediction("a", id=i, seed=seed) for seed in (10, 20) for i in ("2", "1")]
    assert match_references(predictions, references) == [("y",), ("x",), ("y",), ("x",)]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["1"], "1 predictions of seed 3 .* do not fit 2 rows .*1 ids have no prediction: 2"),
        (["1", "2", "9"], "1 ids have no reference: 9"),
        (["1", "2", "2"], "1 ids are predicted more than once: 2"),
    ],
)
def test_ids_that_do_not_fit_are_counted_and_named(ids: list[str], message: str) -> None:
    references = [References(("x",), "1"), References(("y",), "2")]
    with pytest.raises(DpkdError, match=message):
        match_references([Prediction("a", id=i, seed=3) for i in ids], references)


def test_references_with_one_id_twice_are_a_mistake() -> None:
    with pytest.raises(DpkdError, match="1 ids occur in several rows: 1"):
        match_references([Prediction("a", id="1")], [References(("x",), "1"), References(("y",), "1")])


def test_predictions_may_carry_their_references() -> None:
    assert own_references([Prediction("a", references=("x", "y"))]) == [("x", "y")]
    with pytest.raises(DpkdError, match=r"p:2: no `references` here, as in 1 of 2 rows"):
        own_references([Prediction("a", references=("x",)), Prediction("b", where="p:2")])
