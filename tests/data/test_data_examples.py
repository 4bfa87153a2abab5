"""Rows of every shape and format to examples; every kind of bad row found at its line."""

from __future__ import annotations

import csv
import hashlib
import json

import pytest

from dpkd.data.conversations import Message
from dpkd.data.examples import read_examples
from dpkd.data.formats import Example
from dpkd.data.settings import Columns, DataSettings
from dpkd.errors import DpkdError

PROMPT_TURNS = (Message("system", "Be kind."), Message("user", "Hi"))
ROW = {"instruction": "Name a colour.", "input": "", "output": "Red."}
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
]


def read(path, *, require_response=True, **settings):
    return read_examples(DataSettings(path=str(path), **settings), require_response=require_response)


def problem(path, **settings) -> str:
    with pytest.raises(DpkdError) as caught:
        read(path, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ROW, Example("data.jsonl:1", "Name a colour.", "", ("Red.",))),
        (  # as in Dolly on the hub
            {"instruction": "Sum up.", "context": "Long.", "response": "Short.", "category": "x"},
            Example("data.jsonl:1", "Sum up.", "Long.", ("Short.",)),
        ),
        ({"instruction": "Go", "output": "Gone"}, Example("data.jsonl:1", "Go", "", ("Gone",))),
        ({"instruction": "Go", "input": None, "output": "Gone"}, Example("data.jsonl:1", "Go", "", ("Gone",))),
        ({"prompt": "1 + 1 =", "completion": " 2"}, Example("data.jsonl:1", "", "", (" 2",), "1 + 1 =")),
        ({"prompt": "Q", "response": "A"}, Example("data.jsonl:1", "", "", ("A",), "Q")),
        ({"instruction": "Go", "output": ["Gone", "", "Went"]}, Example("data.jsonl:1", "Go", "", ("Gone", "Went"))),
        ({"messages": CHAT}, Example("data.jsonl:1", references=("Hello!",), messages=PROMPT_TURNS)),
        (
            {"messages": [*CHAT, {"role": "user", "content": "Bye"}]},
            Example("data.jsonl:1", references=("Hello!",), messages=PROMPT_TURNS),
        ),
    ],
)
def test_shapes_of_rows(jsonl, row, expected):
    assert read(jsonl(row)).examples == (expected,)


def test_columns_are_mapped_by_the_settings(jsonl):
    path = jsonl({"question": "Why?", "answer": "So.", "prompt": "not this"})
    found = read(path, columns=Columns(instruction="question", output="answer"))
    assert found.examples == (Example("data.jsonl:1", "Why?", "", ("So.",)),)


def test_a_mapped_response_rules_out_messages(jsonl):
    path = jsonl({"messages": CHAT, "prompt": "Why?", "chosen": "So."})
    (example,) = read(path, columns=Columns(output="chosen")).examples
    assert (example.prompt, example.references) == ("Why?", ("So.",))


def test_settings_that_contradict_each_other():
    for wrong in ({"instruction": "a", "prompt": "b"}, {"prompt": "a", "input": "b"}, {"messages": "a", "output": "b"}):
        with pytest.raises(ValueError, match=r"name one of|name `instruction`|leave `input`"):
            Columns(**wrong)


def test_prompts_without_responses(jsonl):
    path = jsonl({"prompt": "Once"}, {"prompt": "Twice", "completion": ""}, {"prompt": "Thrice", "completion": "x"})
    found = read(path, require_response=False)
    assert [e.references for e in found.examples] == [(), (), ("x",)]
    path = jsonl({"messages": CHAT[:2]}, {"messages": CHAT}, {"messages": [*CHAT, CHAT[1]]})
    found = read(path, require_response=False)
    assert [(len(e.messages or ()), e.references) for e in found.examples] == [(2, ()), (2, ("Hello!",)), (4, ())]


SHAREGPT = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello!"},
]
BYE = [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Farewell."}]
TURNS = (*PROMPT_TURNS, Message("assistant", "Hello!"), Message("user", "Bye"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": SHAREGPT}, Example("data.jsonl:1", references=("Hello!",), messages=PROMPT_TURNS)),
        (  # TRL's conversational prompt and completion: what stands in the prompt is not trained
            {"prompt": [*CHAT, BYE[0]], "completion": [BYE[1]]},
            Example("data.jsonl:1", references=("Farewell.",), messages=TURNS),
        ),
        (
            {"prompt": CHAT[:2], "completion": "Hello!"},
            Example("data.jsonl:1", references=("Hello!",), messages=PROMPT_TURNS),
        ),
        (
            {"messages": [CHAT[0], {"role": "user", "content": [{"type": "text", "text": "Hi"}]}, CHAT[2]]},
            Example("data.jsonl:1", references=("Hello!",), messages=PROMPT_TURNS),
        ),
        (
            {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."},
            Example("data.jsonl:1", references=("Hello!",), prompt="Hi", rejected="Go away."),
        ),
        (
            {"prompt": CHAT[:2], "chosen": [CHAT[2]], "rejected": [{"role": "assistant", "content": "Go."}]},
            Example("data.jsonl:1", references=("Hello!",), messages=PROMPT_TURNS, rejected="Go."),
        ),
        (
            {"chosen": CHAT, "rejected": [*CHAT[:2], {"role": "assistant", "content": "Go."}]},
            Example("data.jsonl:1", references=("Hello!",), messages=PROMPT_TURNS, rejected="Go."),
        ),
    ],
)
def test_forms_of_other_tools(jsonl, row, expected):
    assert read(jsonl(row)).examples == (expected,)


def test_every_assistant_turn_is_an_example(jsonl):
    path = jsonl({"messages": [*CHAT, *BYE]}, {"messages": CHAT})
    found = read(path)
    assert [(e.id, e.references, len(e.messages)) for e in found.examples] == [
        ("data.jsonl:1#1", ("Hello!",), 2),
        ("data.jsonl:1#2", ("Farewell.",), 4),
        ("data.jsonl:2", ("Hello!",), 2),
    ]
    assert found.lines()[1] == (
        "2 rows are 3 examples: every assistant turn of a conversation is trained on (data.train_on: all)"
    )
    last = read(path, train_on="last")
    assert [(e.id, e.references) for e in last.examples] == [
        ("data.jsonl:1", ("Farewell.",)),
        ("data.jsonl:2", ("Hello!",)),
    ]
    assert len(last.lines()) == 1


def test_pairs_are_used_or_refused(jsonl):
    path = jsonl({"prompt": "Q", "chosen": "A", "rejected": "B"})
    settings = DataSettings(path=path, columns=Columns(output="chosen"))
    with pytest.raises(DpkdError, match=r"this loss ignores the rejected one.*text\.source=preference.*drop_rejected"):
        read_examples(settings, pairs=False)
    for used in (read_examples(settings, pairs=True), read_examples(settings)):
        assert used.examples[0].rejected == "B"
    dropped = read_examples(settings.model_copy(update={"drop_rejected": True}), pairs=False)
    assert dropped.examples[0].references == ("A",)
    other = jsonl({"prompt": "Q", "response": "A", "worse": "B"}, {"prompt": "Q", "response": "A"}, name="o.jsonl")
    with pytest.raises(DpkdError, match=r"o\.jsonl:2: has no rejected response"):
        read_examples(DataSettings(path=other, columns=Columns(rejected="worse")), pairs=True)


def test_a_mixture_takes_rows_by_weight(jsonl):
    one = jsonl(*({"prompt": f"a{i}", "completion": "x"} for i in range(200)), name="one.jsonl")
    two = jsonl(*({"question": f"b{i}", "answer": "y"} for i in range(40)), name="two.jsonl")
    parts = [
        {"path": one, "weight": 3},
        {"path": two, "weight": 1, "columns": {"instruction": "question", "output": "answer"}, "template": "alpaca"},
    ]
    settings = DataSettings(mix=parts)
    found = read_examples(settings, seed=1)
    kinds = [e.template for e in found.examples]
    # It ends with the first data set that ends, so that no row comes twice.
    assert len(set(found.examples)) == len(found.examples) > 100
    assert 0.15 < kinds.count("alpaca") / len(kinds) < 0.35
    assert {e.id.partition(":")[0] for e in found.examples} == {"1/one.jsonl", "2/two.jsonl"}
    assert read_examples(settings, seed=1).fingerprint == found.fingerprint
    assert read_examples(settings, seed=2).fingerprint != found.fingerprint
    again = read_examples(settings.model_copy(update={"mix_until": "all_exhausted"}), seed=1)
    assert len({e.id for e in again.examples}) == len(again.examples)
    assert {e.prompt for e in again.examples if e.prompt} == {f"a{i}" for i in range(200)}
    assert any("+1" in e.id for e in again.examples)


def test_the_fingerprint_of_plain_rows_stays(jsonl):
    """A store or a run of an earlier version is found again."""
    example = Example("data.jsonl:1", "Go", "", ("Gone",))
    old = {"id": "data.jsonl:1", "input": "", "instruction": "Go", "messages": None, "prompt": None}
    text = json.dumps(old | {"references": ["Gone"]}, sort_keys=True) + "\n"
    assert read(jsonl({"instruction": "Go", "output": "Gone"})).examples == (example,)
    assert read(jsonl({"instruction": "Go", "output": "Gone"})).fingerprint == hashlib.sha256(text.encode()).hexdigest()


BAD_ROWS = [
    (b'{"instruction": ', "not JSON: Expecting value at column 16"),
    (b'["a list"]', 'not an object: expected {...}, found ["a list"]'),
    (b'{"instruction": "caf\xe9", "output": "x"}', "not UTF-8: byte 0xe9 at byte 21 of the line"),
    (b'{"instruction": "x", "output": "\\ud83d"}', "not UTF-8: `output` holds U+D83D, half of a character, at 1"),
    ({"instruction": "x"}, "missing field: no response in `output` or `response` or `completion` or `chosen`"),
    ({"output": "x"}, "missing field: `instruction` is not there"),
    ({"instruction": None, "output": "x"}, "missing field: `instruction` is null"),
    ({"instruction": "x", "output": 42}, "wrong type: `output` is a number (42), expected text"),
    ({"instruction": "x", "output": [["a"]]}, "wrong type: `output` is a list (['a']), expected text"),
    ({"instruction": "x", "input": {}, "output": "x"}, "wrong type: `input` is an object ({}), expected text"),
    ({"instruction": " ", "output": "x"}, "empty instruction: `instruction` holds no text"),
    ({"instruction": "x", "output": " \n"}, "empty response: `output` holds no text"),
    ({"instruction": "x", "output": []}, "empty response: `output` holds no text"),
    ({"instruction": "x", "output": "a", "response": "b"}, "ambiguous: both `output` and `response` are given"),
    (b"[" * 100_000, "not JSON: brackets nested too deeply"),
]


@pytest.mark.parametrize(("bad", "said"), BAD_ROWS)
def test_every_kind_of_bad_row_is_found_at_its_line(jsonl, bad, said):
    path = jsonl(ROW, b"", bad, ROW)
    assert problem(path) == (
        f"data.path: 1 row of {path} cannot be read:\n"
        f"  data.jsonl:3: {said}\n"
        "Fix these rows, or skip and count them: --set data.on_bad_row=skip"
    )


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("Hi", "wrong type: `messages` is text ('Hi'), expected a list of messages"),
        (["Hi"], "wrong type: message 1 is text ('Hi'), expected an object"),
        ([{"role": "user"}], "missing field: message 1 has no `content`"),
        ([{"role": "user", "content": ["x"]}], "wrong type: `content` of message 1 is a list (['x']), expected text"),
        (CHAT[:2], "missing field: `messages` has no assistant message"),
        (CHAT[2:], "empty prompt: `messages` has nothing before the response"),
        ([*CHAT[:2], {"role": "assistant", "content": ""}], "empty response: the last assistant message has no text"),
        (
            [*CHAT[:2], {"role": "assistant", "content": "", "tool_calls": [{}]}],
            "tool call: message 3 calls a tool; only text can be trained on",
        ),
    ],
)
def test_bad_conversations(jsonl, messages, said):
    assert f"  data.jsonl:2: {said}\n" in problem(jsonl({"messages": CHAT}, {"messages": messages}))


def test_bad_rows_are_reported_together_up_to_twenty(jsonl):
    path = jsonl(ROW, *[{"instruction": "x"}] * 30)
    lines = problem(path).split("\n")
    assert lines[0] == f"data.path: at least 20 rows of {path} cannot be read:"
    assert [line.split(": ")[0] for line in lines[1:-1]] == [f"  data.jsonl:{n}" for n in range(2, 22)]


def test_bad_rows_are_skipped_and_counted_and_ids_stay(jsonl):
    path = jsonl({"instruction": "no answer"}, ROW, b"{", ROW, {"instruction": "x", "output": ""}, b"}")
    found = read(path, on_bad_row="skip")
    assert [e.id for e in found.examples] == ["data.jsonl:2", "data.jsonl:4"]
    assert found.skipped_by_reason() == {"missing field": 1, "not JSON": 2, "empty response": 1}
    assert found.lines() == [
        f"{path}: 2 examples",
        "skipped 1: missing field (first: data.jsonl:1)",
        "skipped 2: not JSON (first: data.jsonl:3)",
        "skipped 1: empty response (first: data.jsonl:5)",
    ]


def test_skipping_does_not_stop_at_twenty(jsonl):
    found = read(jsonl(*[b"{"] * 25, ROW), on_bad_row="skip")
    assert (len(found.skipped), [e.id for e in found.examples]) == (25, ["data.jsonl:26"])


def test_nothing_but_bad_rows(jsonl):
    path = jsonl(b"{", b"x")
    assert problem(path, on_bad_row="skip") == (
        f"data.path: no row of {path} can be used.\nskipped 2: not JSON (first: data.jsonl:1)"
    )
    path = jsonl(b"")
    assert problem(path) == f"data.path: there are no rows in {path}. Name a set that has some: --data FILE.jsonl"


def test_columns_that_are_not_understood(jsonl):
    path = jsonl({"question": "Why?", "answer": "So."}, {"question": "How?"})
    said = (
        "data.jsonl:1: the columns are not understood: question, answer{named}. dpkd reads instruction (and "
        "input or context) with output, response, completion or chosen; prompt with output, response, completion or "
        "chosen; or chat messages (messages, conversations). Map the columns: --set "
        "data.columns.instruction=COLUMN --set data.columns.output=COLUMN "
        "(or data.columns.prompt, data.columns.messages)."
    )
    assert problem(path) == said.format(named="")
    assert problem(path, on_bad_row="skip") == said.format(named="")
    columns = Columns(instruction="question", output="anwser")
    named = " (data.columns says instruction=question, output=anwser)"
    assert problem(path, columns=columns) == said.format(named=named)


def test_two_shapes_that_fit_are_an_error_with_both_names(jsonl):
    assert problem(jsonl({"messages": CHAT, "prompt": "x", "response": "y"})) == (
        "data.jsonl:1: the prompt may be in `messages` or in `prompt`. Choose one, e.g. "
        "--set data.columns.messages=messages"
    )
    assert problem(jsonl({"instruction": "x", "output": "a", "response": "b"})) == (
        "data.jsonl:1: the response may be in `output` or in `response`. Choose one, e.g. "
        "--set data.columns.output=output"
    )


def test_a_mapped_input_column_that_no_row_has(jsonl):
    path = jsonl(ROW)
    assert problem(path, columns=Columns(instruction="instruction", input="contxt")) == (
        f"data.columns.input: no row of {path} has a column 'contxt'."
    )


def test_only_line_feeds_end_a_line_and_a_byte_order_mark_is_no_text(jsonl):
    text = json.dumps({"instruction": "日本 é\u2028x", "output": "😀\x85y"}, ensure_ascii=False).encode()
    (example,) = read(jsonl(b"\xef\xbb\xbf" + text + b"\r")).examples
    assert (example.instruction, example.references) == ("日本 é\u2028x", ("😀\x85y",))


ROWS = [{"instruction": "Sum\nup", "input": "a,b", "output": "42"}, {"instruction": "日本", "input": "", "output": "é"}]


def write_as(suffix, path):
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    elif suffix == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif suffix == "data.json":
        path.write_text(json.dumps({"version": 1, "data": ROWS}))
    elif suffix == "lines.json":
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    elif suffix == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "data.json", "lines.json", "csv", "parquet"])
def test_every_format_gives_the_same_examples(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    write_as(suffix, path)
    first, second = (2, 4) if suffix == "csv" else (1, 2)  # a header, and a cell of two lines
    assert read(path).examples == (
        Example(f"{path.name}:{first}", "Sum\nup", "a,b", ("42",)),
        Example(f"{path.name}:{second}", "日本", "", ("é",)),
    )
    assert read(path, limit=1, streaming=True).examples == read(path).examples[:1]


def test_lists_and_messages_in_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"messages": CHAT}]), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet").examples[0].references == ("Hello!",)
    pq.write_table(pa.Table.from_pylist([{"instruction": "x", "output": ["a", "b"]}]), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet").examples[0].references == ("a", "b")


def test_bad_rows_of_csv(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"instruction,output\na,b\nc\nd,e,f\ncaf\xe9,g\n")
    assert problem(path).split("\n")[1:-1] == [
        "  x.csv:3: missing field: no response in `output` or `response` or `completion` or `chosen`",
        "  x.csv:4: too many cells: the header has 2 columns",
        "  x.csv:5: not UTF-8: `instruction` holds U+DCE9, half of a character, at 4",
    ]
    path.write_text("instruction,output\na," + "b" * 200_000)
    assert len(read(path).examples[0].references[0]) == 200_000
    assert csv.field_size_limit() == 131_072  # Python's own, left as it was


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (
            'instruction,output\na,b\nc,"d\n' + "e,f\n" * 60,
            "a quoted cell is never closed, in the row that begins on line 3",
        ),
        ('instruction,output\na,"b" c\n', "broken quotes (',' expected after '\"'), in the row that begins on line 2"),
        ("instruction,output,output\na,b,c\n", "the header names 'output' more than once"),
    ],
    ids=["open-quote", "quote-inside", "doubled-header"],
)
def test_a_csv_that_could_be_read_two_ways_is_refused(tmp_path, text, what):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DpkdError) as caught:
        read(tmp_path / "x.csv", on_bad_row="skip")
    assert str(caught.value) == f"{tmp_path / 'x.csv'}: cannot be read as csv: {what}"


def test_broken_files(tmp_path):
    (tmp_path / "x.json").write_text('[{"instruction": "a"')
    assert problem(tmp_path / "x.json") == (
        f"{tmp_path}/x.json: not a JSON list: Expecting ',' delimiter: line 1 column 21 (char 20). "
        "Expected a list of objects."
    )
    (tmp_path / "x.parquet").write_text("no parquet")
    assert problem(tmp_path / "x.parquet").startswith(f"{tmp_path}/x.parquet: cannot be read as parquet: ")


def test_the_fingerprint_is_of_the_content(jsonl, tmp_path):
    one = read(jsonl(ROW, {**ROW, "output": "Blue."})).fingerprint
    assert one == read(jsonl(ROW, {"category": "x", **ROW, "output": "Blue."}, name="other/data.jsonl")).fingerprint
    others = {
        read(jsonl(ROW, {**ROW, "output": "blue."})).fingerprint,
        read(jsonl({**ROW, "output": "Blue."}, ROW)).fingerprint,
        read(jsonl(ROW)).fingerprint,
        read(jsonl(ROW, b"", {**ROW, "output": "Blue."})).fingerprint,  # other lines, other ids
    }
    assert one not in others
    assert len(others) == 4
    # The same in every process and version, because teacher text is stored under it.
    content = (
        '{"id": "data.jsonl:1", "input": "", "instruction": "Name a colour.", '
        '"messages": null, "prompt": null, "references": ["Red."]}\n'
    )
    assert read(jsonl(ROW)).fingerprint == hashlib.sha256(content.encode()).hexdigest()


def test_real_rows(shared):
    found = read(shared / "dolly" / "train.jsonl")
    assert (len(found.examples), len(found.skipped)) == (13_420, 0)
    assert found.examples[-1].id == "train.jsonl:13420"
    limited = read(shared / "dolly" / "train.jsonl", limit=7)
    assert limited.examples == found.examples[:7]
    chosen = read(shared / "dolly")
    assert len(chosen.examples) == 13_420  # of three files, the one of the split
    assert len(read(shared / "dolly", split="dev").examples) == 1_000
