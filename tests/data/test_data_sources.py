"""Finding the data: files, folders, the hub; what is said when it is not there. No test goes to a network."""

from __future__ import annotations

import json

import pytest

from dpkd.data.examples import read_examples
from dpkd.data.settings import DataSettings
from dpkd.errors import DpkdError

ROW = {"instruction": "Name a colour.", "input": "", "output": "Red."}


def problem(path, **settings) -> str:
    with pytest.raises(DpkdError) as caught:
        read_examples(DataSettings(path=str(path), **settings))
    return str(caught.value)


@pytest.fixture
def no_hub(monkeypatch):
    """The hub as it is without a network, at once."""
    import datasets

    def load(path, *_, **__):
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_a_file_that_is_not_there(tmp_path, jsonl):
    jsonl(ROW, name="train.jsonl")
    assert problem(tmp_path / "trian.jsonl") == (
        f"data.path: there is no file {tmp_path}/trian.jsonl. Did you mean {tmp_path}/train.jsonl?"
    )
    assert problem(tmp_path / "q.csv") == f"data.path: there is no file {tmp_path}/q.csv."
    jsonl(ROW, name="e6.jsonl")
    assert problem(tmp_path / "nofile.jsonl") == f"data.path: there is no file {tmp_path}/nofile.jsonl."
    assert problem(tmp_path / "train.json").endswith(f"Did you mean {tmp_path}/train.jsonl?")
    assert problem(tmp_path / "zzzz" / "deep" / "q.jsonl") == (
        f"data.path: there is no file {tmp_path}/zzzz/deep/q.jsonl. There is no folder {tmp_path}/zzzz either."
    )


def test_a_file_of_another_format(tmp_path):
    (tmp_path / "x.tsv").write_text("")
    assert problem(tmp_path / "x.tsv") == (
        f"data.path: {tmp_path}/x.tsv is not a format that dpkd reads; expected .jsonl, .json, "
        ".csv or .parquet, "
        "or a folder of such files."
    )


def test_a_folder_is_read_whole_in_order_of_names(tmp_path, jsonl):
    jsonl(ROW, ROW, name="b/two.jsonl")
    jsonl(ROW, name="b/.hidden/no.jsonl")
    (tmp_path / "b" / "one.json").write_text(json.dumps([ROW]))
    (tmp_path / "b" / "notes.md").write_text("no data")
    found = read_examples(DataSettings(path=str(tmp_path / "b")))
    assert [e.id for e in found.examples] == ["one.json:1", "two.jsonl:1", "two.jsonl:2"]
    assert found.source == f"{tmp_path}/b (2 files)"


def test_a_folder_with_files_of_splits_gives_the_split_alone(tmp_path, jsonl):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test"):
        jsonl(ROW, name=f"d/{name}.jsonl")
    jsonl(ROW, name="d/train/more.jsonl")
    found = read_examples(DataSettings(path=str(tmp_path / "d")))
    assert [e.id for e in found.examples] == [
        "train/more.jsonl:1",
        "train-00000-of-00002.jsonl:1",
        "train-00001-of-00002.jsonl:1",
    ]


def test_a_folder_without_the_split_is_an_error(tmp_path, jsonl):
    jsonl(ROW, name="d/eval.jsonl")
    jsonl(ROW, name="d/dev.jsonl")
    assert problem(tmp_path / "d") == (
        f"data.path: the folder {tmp_path}/d holds dev.jsonl, eval.jsonl but nothing named 'train'. "
        "Name one file, or the split: --set data.split=NAME"
    )
    (tmp_path / "empty").mkdir()
    assert problem(tmp_path / "empty") == (
        f"data.path: the folder {tmp_path}/empty holds no .jsonl, .json, .csv or .parquet file."
    )


def test_a_folder_saved_by_datasets(tmp_path):
    import datasets

    train = datasets.Dataset.from_list([ROW, ROW])
    train.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": train}).save_to_disk(str(tmp_path / "two"))
    for name in ("one", "two"):
        found = read_examples(DataSettings(path=str(tmp_path / name)))
        assert [e.id for e in found.examples] == [f"{name}/train:1", f"{name}/train:2"]
    assert problem(tmp_path / "two", split="test") == (f"data.path: {tmp_path}/two has no split 'test'; it has train.")


@pytest.mark.usefixtures("no_hub")
def test_the_default_data_without_a_hub():
    with pytest.raises(DpkdError) as caught:
        read_examples(DataSettings())
    assert str(caught.value) == (
        "data.path: the default data set databricks/databricks-dolly-15k is not a local file, "
        "and loading it from the hub failed: Couldn't reach 'databricks/databricks-dolly-15k' on the Hub "
        "(OfflineModeIsEnabled). Without "
        "the hub, pass your own file: --data FILE.jsonl (`dpkd demo` needs no data)."
    )


@pytest.mark.usefixtures("no_hub")
def test_another_data_set_without_a_hub():
    assert "the data set somebody/something is not a local file" in problem("somebody/something")


def test_a_wrong_split_of_a_hub_data_set(monkeypatch):
    import datasets

    def load(*_, **__):
        raise ValueError("Unknown split \"trian\". Should be one of ['train'].\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert problem("somebody/something", split="trian") == (
        "data.path: the data set somebody/something is not a local file, and loading it from the hub failed: "
        "Unknown split \"trian\". Should be one of ['train']. Check the id, split and subset, "
        "or pass your own file: --data FILE.jsonl"
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_is_read_through_datasets(monkeypatch, jsonl, tmp_path, streaming):
    """The hub is replaced by a local file; loading, caching and streaming are the library's own."""
    import datasets

    file = jsonl(*[{"instruction": f"Say {n}", "context": "", "response": str(n)} for n in range(5)])
    asked = []
    real = datasets.load_dataset

    def load(path, subset, *, split, streaming):
        asked.append((path, subset, split, streaming))
        return real("json", data_files={split: file}, split=split, streaming=streaming, cache_dir=str(tmp_path))

    monkeypatch.setattr(datasets, "load_dataset", load)
    datasets.disable_progress_bars()
    found = read_examples(DataSettings(path="some/talk", subset="en", split="test", limit=3, streaming=streaming))
    assert asked == [("some/talk", "en", "test", streaming)]
    assert [e.id for e in found.examples] == ["talk/test:1", "talk/test:2", "talk/test:3"]
    assert [e.references for e in found.examples] == [("0",), ("1",), ("2",)]
    assert found.source == "hub data set some/talk, split test"


def test_a_stream_that_breaks_half_way(monkeypatch):
    import datasets

    def rows():
        yield ROW
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    assert "the line is dead" in problem("some/talk", streaming=True, limit=9)
