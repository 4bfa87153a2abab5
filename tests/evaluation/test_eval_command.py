"""`dpkd eval` as a user calls it: models by sets, over seeds, in the agreed files."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest
from command_line import printed

import dpkd
from dpkd.errors import DpkdError, SettingsError
from dpkd.evaluation.target import model_of

QUICK = ("--seeds", "1,2", "--max-new-tokens", "4", "--limit", "4")


call = partial(printed, "eval")


@pytest.fixture
def here(folder, tmp_path, monkeypatch) -> Path:
    """A working folder with the models and two sets."""
    monkeypatch.chdir(tmp_path)
    for name in ("student", "teacher"):
        (tmp_path / name).symlink_to(folder / name)
    rows = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "one.jsonl").write_text("".join(rows[:5]))
    (tmp_path / "two.jsonl").write_text("".join(rows[5:]))
    return tmp_path


def test_what_was_written_is_compared_as_the_documentation_says(here):
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
    block = next(part for part in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL) if "dpkd compare" in part)
    (here / "one.jsonl").rename("rows.jsonl")
    commands = [shlex.split(line)[1:] for line in block.splitlines()]
    quick = {"eval": QUICK, "report": ("--no-figures",)}
    told = {words[0]: printed(*words, *quick.get(words[0], ())) for words in commands}
    assert list(told) == ["eval", "compare", "report"]
    assert re.search(r"^ *teacher \(baseline\) .*\n *student ", told["compare"], flags=re.M), told["compare"]
    assert "2 runs compared" in Path("report.html").read_text(encoding="utf-8")


def scores(path: str) -> dict:
    return json.loads(Path(path, "scores.json").read_text())


def test_models_by_sets_over_seeds(here):
    output = call(
        "--model",
        "student",
        "--model",
        "teacher",
        "--data",
        "one.jsonl",
        "--data",
        "two.jsonl",
        *QUICK,
        "--teacher",
        "teacher",
        "--cuts",
        "2",
    )
    assert output.count("4 rows read, 4 scored under each of 2 seeds") == 4
    overview = [line.split() for line in output.splitlines() if re.match(r" ?(student|teacher) +(one|two) ", line)]
    assert [(line[0], line[1], line[2]) for line in overview] == [
        (model, name, "4") for model in ("student", "teacher") for name in ("one", "two")
    ]
    for model in ("student", "teacher"):
        for name in ("one", "two"):
            found = scores(f"runs/eval/{model}/{name}")
            assert (found["set"], found["rows"], found["seeds"], found["greedy"]) == (name, 4, [1, 2], False)
            assert (found["model"], found["teacher"]) == (model, "teacher")
            assert found["generation"] == {
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": 0,
                "max_new_tokens": 4,
                "max_prompt_tokens": 256,
                "template": "auto",
                "dtype": "float32",
            }
            assert found["data"]["skipped"] == {}
            assert [len(found["metrics"][m]["values"]) for m in ("rouge_l", "nll", "forward_kl")] == [2, 1, 1]
            assert set(found["units"]) == set(found["metrics"])
            lines = Path(f"runs/eval/{model}/{name}/predictions-2.jsonl").read_text().splitlines()
            assert {"id", "prompt", "prediction", "references", "seed", "tokens", "truncated", "scores"} <= set(
                json.loads(lines[0])
            )
            assert len(lines) == 4
    assert scores("runs/eval/teacher/one")["metrics"]["forward_kl"]["mean"] == pytest.approx(0.0, abs=1e-6)


def test_greedy_is_one_pass_and_python_agrees(here):
    (result,) = json.loads(
        call("--model", "student", "--data", "one.jsonl", "--greedy", "--max-new-tokens", 4, "--json")
    )
    assert (result["greedy"], result["seeds"]) == (True, [10])
    assert result["metrics"]["rouge_l"]["sd"] is None
    same = dpkd.evaluate("student", "one.jsonl", greedy=True, max_new_tokens=4)
    assert same.as_dict() == result
    assert call("--model", "student", "--data", "one.jsonl", "--greedy", "--max-new-tokens", 4).count("greedy") == 1


def test_rows_are_read_as_asked(here):
    with Path("one.jsonl").open("a") as file:
        file.write('{"prompt": 3, "response": "x"}\n')
    with pytest.raises(DpkdError, match=r"one.jsonl:6: wrong type"):
        call("--model", "student", "--data", "one.jsonl", "--seeds", "1", "--max-new-tokens", 2)
    asked = ("--on-bad-row", "skip", "--template", "alpaca", "--set", "data.columns={instruction: prompt}")
    # Alpaca's frame is longer than the toy's context: the template was heeded, and so was the bad row.
    with pytest.raises(
        DpkdError, match=r"no row of 6 is left to score: 1 wrong type; 5 prompts longer than 126 tokens"
    ):
        call(
            "--model",
            "student",
            "--data",
            "one.jsonl",
            *asked,
            "--long-prompts",
            "skip",
            "--set",
            "data.max_prompt_tokens=126",
        )


def test_rows_left_out_are_shown(here):
    with Path("one.jsonl").open("a") as file:
        file.write('{"prompt": 3, "response": "x"}\n')
    output = call(
        "--model",
        "student",
        "--data",
        "one.jsonl",
        "--seeds",
        "1",
        "--max-new-tokens",
        2,
        "--on-bad-row",
        "skip",
        "--unit",
        "tokens",
        "--cuts",
        "8",
    )
    assert "6 rows read, 1 skipped (wrong type), 5 scored" in output
    assert "by reference length (tokens)" in output
    assert scores("runs/eval/student/one")["lengths"]["unit"] == "tokens"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--seeds", "1,1"), "--seeds '1,1': expected distinct comma-separated integers"),
        (("--seeds", "a"), "--seeds 'a': expected distinct comma-separated integers"),
        (("--cuts", "5,2"), "length cuts 5,2: expected"),
        (("--set", "train.lr=1"), "only settings of `data`"),
        (("--set", "data.max_promt_tokens=1"), "did you mean data.max_prompt_tokens"),
        (("--data", "sub/one.jsonl"), "one.jsonl, sub/one.jsonl would all be saved under one"),
        (("--model", "sub/student"), "student, sub/student would all be saved under runs/eval/student"),
        (("--model", "teacher", "--output", "x"), "--output x: is the folder of a single model"),
    ],
)
def test_mistakes_are_said_before_anything_is_loaded(here, monkeypatch, arguments, problem):
    monkeypatch.setattr("dpkd.models.in_memory.load_model", lambda *_, **__: pytest.fail("too late"))
    Path("sub").mkdir()
    shutil.copy("one.jsonl", "sub/one.jsonl")
    Path("sub/student").mkdir()
    with pytest.raises(SettingsError, match=re.escape(problem)):
        call("--model", "student", "--data", "one.jsonl", *arguments)


def test_a_folder_that_is_no_whole_model_is_said(here):
    bare = Path("bare")
    shutil.copytree("student", bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(DpkdError, match=r"bare.* tokenizer"):
        call("--model", "bare", "--data", "one.jsonl")
    run = Path("runs/kd-1")
    (run / "adapter").mkdir(parents=True)
    (run / "config.resolved.yaml").write_text("loss: {name: kd}\n")
    with pytest.raises(DpkdError, match=r"adapter is part of a run, not a model: pass the run, runs/kd-1"):
        call("--model", "runs/kd-1/adapter", "--data", "one.jsonl")
    with pytest.raises(DpkdError, match=r"runs/kd-1 has no model yet"):
        call("--model", "runs/kd-1", "--data", "one.jsonl")


@pytest.mark.parametrize("command", ["eval", "sample"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("runs/nope", "there is no folder runs/nope. --model takes"),
        ("runs/dk-1", "there is no folder runs/dk-1. Did you mean runs/kd-1? --model takes"),
        ("runs/kd-1/modle", "there is no folder runs/kd-1/modle. Did you mean runs/kd-1/model? --model takes"),
        ("models/x", "there is no folder models/x. --model takes"),
        ("kd-1", "Did you mean runs/kd-1/model? Name a hub id, or a folder with config.json and model.safetensors "),
    ],
)
def test_a_folder_that_is_not_there_is_no_hub_id(here, monkeypatch, command, name, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree("student", "runs/kd-1/model")
    Path("runs/kd-1/config.resolved.yaml").write_text("loss: {name: kd}\n")
    Path("models").mkdir()
    with pytest.raises(DpkdError) as caught:
        printed(command, "--model", name, "--data", "one.jsonl", "--output", "out.jsonl")
    assert said in str(caught.value)
    assert ("a run folder (dpkd train's output), a model folder or a hub id" in str(caught.value)) == ("/" in name)


@pytest.mark.parametrize("command", ["eval", "sample"])
def test_a_set_that_is_not_there_is_named_by_its_flag(here, command):
    Path("empty.jsonl").write_text("")
    for name, said in (
        ("nowhere.jsonl", "--data: there is no file nowhere.jsonl."),
        ("empty.jsonl", "--data: there are no rows in empty.jsonl. Name a set that has some: --data FILE.jsonl"),
    ):
        with pytest.raises(DpkdError) as caught:
            printed(command, "--model", "student", "--data", name, "--output", "out.jsonl")
        assert str(caught.value) == said


def test_a_model_of_the_hub_may_have_the_name_of_a_folder_here(here, monkeypatch):
    Path("models").mkdir()
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "config.json")
    assert model_of("models/x").model == "models/x"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(DpkdError, match="there is no folder models/x"):
        model_of("models/x")
    assert model_of("others/x").model == "others/x"


def test_a_run_brings_its_teacher_and_its_template(here):
    run = Path("runs/kd-1")
    shutil.copytree("student", run / "model")
    (run / "config.resolved.yaml").write_text(
        "teacher: {model: teacher}\ndata: {template: none, max_prompt_tokens: 1}\n"
    )
    output = call("--model", run, "--data", "one.jsonl", *QUICK)
    assert "forward KL" in output
    assert scores("runs/kd-1/eval/one")["generation"]["template"] == "none"
    call("--model", "runs/kd-1/model", "--data", "one.jsonl", *QUICK)
    assert Path("runs/eval/kd-1/one/scores.json").exists()


def test_a_set_of_the_papers_from_a_folder(here):
    rows = [{"instruction": "a", "input": "", "output": f"{'word ' * count}"} for count in (10, 11, 12)]
    Path("sets").mkdir()
    Path("sets/sinst.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = ("--long-prompts", "skip", "--seeds", "1", "--max-new-tokens", 2)
    with pytest.raises(
        DpkdError, match=r"no row of 3 is left to score: 1 first references of at most 10 words; 2 prompts"
    ):
        call("--model", "student", "--data", "sinst", "--sets-folder", "sets", *long)


@pytest.mark.parametrize(("columns", "beside"), [(80, (3, 1)), (200, (4,))])
def test_scores_by_length_fit_the_terminal(here, columns, beside):
    """Buckets that do not fit beside each other are printed below each other, and buckets without rows only named."""
    output = call(*("--model", "student", "--data", "one.jsonl", *QUICK), "--cuts", "1,2,3,30,70", columns=columns)
    assert max(map(len, output.splitlines())) <= columns
    assert "…" not in output
    buckets = scores("runs/eval/student/one")["lengths"]["buckets"]
    filled = [bucket for bucket in buckets if bucket["rows"]]
    assert [bucket["label"] for bucket in buckets if not bucket["rows"]] == ["(30,70]", "(70,∞)"]
    assert "no rows in (30,70], (70,∞)\n" in output
    blocks = output.split("by reference length (words)")[1:]
    assert [len(re.findall(r"\(\d+,\d+\]", block.splitlines()[0])) for block in blocks] == list(beside)
    for name, printed_as in (("exact_match", "exact match"), ("words", "words per answer")):
        lines = [re.search(rf"^ {printed_as} +(.+)$", block, flags=re.MULTILINE)[1] for block in blocks]
        means = [float(mean) for line in lines for mean in re.findall(r"(\S+) ± ", line)]
        assert means == pytest.approx([bucket["metrics"][name]["mean"] for bucket in filled], abs=5e-3)


@pytest.mark.parametrize(("columns", "spread"), [(80, False), (200, True)])
def test_the_overview_has_one_line_for_each_model(here, columns, spread):
    models = ("--model", "student", "--model", "teacher", "--teacher", "teacher")
    output = call(*models, "--data", "one.jsonl", *QUICK, columns=columns)
    assert max(map(len, output.splitlines())) <= columns
    overview = output[output.rindex("answers and scores:") :]
    lines = [line for line in overview.splitlines() if re.match(r" (student|teacher) +one +4 ", line)]
    assert [len(re.findall(r"\d\.\d+", line)) for line in lines] == [7 if spread else 5] * 2
    assert ("±" in overview) is spread
