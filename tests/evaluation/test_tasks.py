"""`dpkd eval --tasks`: benchmarks of lm-eval, on tasks of these tests' own that need no download."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import printed

from dpkd.errors import DpkdError, SettingsError
from dpkd.evaluation.tasks import TaskSettings, load_tasks, metric_name

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (dpkd[tasks])"
)
QUESTIONS = [
    {"question": f"The {noun} is", "choices": choices, "label": i % 2}
    for i, (noun, choices) in enumerate(
        zip(
            ["cat", "dog", "old tree", "river", "house", "big cat"],
            [["red", "blue green"], ["old", "new"], ["big", "small"]] * 2,
            strict=True,
        )
    )
]
CHOICE = """
task: toy_choice
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS, validation: QUESTIONS}}
output_type: multiple_choice
test_split: test
fewshot_split: validation
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
FREE = """
task: toy_free
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
GROUP = """
group: toy_group
task: [toy_choice, toy_free]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
"""
NEEDS_THE_HUB = "task: far_away\ndataset_path: nobody/has-this\noutput_type: generate_until\ntest_split: test\n"


@pytest.fixture
def here(folder, tmp_path, monkeypatch) -> Path:
    """A working folder with two models, a set, and a folder of tasks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    for name in ("student", "teacher", "rows.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    questions = tasks / "questions.jsonl"
    questions.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    for name, text in (("choice", CHOICE), ("free", FREE), ("group", GROUP), ("hub", NEEDS_THE_HUB)):
        (tasks / f"{name}.yaml").write_text(text.replace("QUESTIONS", str(questions)))
    return tmp_path


def scores(path: str) -> dict:
    return json.loads(Path(path, "scores.json").read_text())


def answered(path: str) -> list[dict]:
    (file,) = Path(path).glob("predictions-*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def expected_hits(folder: Path) -> list[bool]:
    """For each question, whether the likelier continuation is the right one: by float64 forwards, one by one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).double()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hits = []
    for one in QUESTIONS:
        totals = []
        for choice in one["choices"]:
            prompt, text = tokenizer(one["question"])["input_ids"], tokenizer(" " + choice)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + text])).logits[0].numpy()
            rows = logits[len(prompt) - 1 : -1]
            totals.append(sum(row[t] - np.logaddexp.reduce(row) for row, t in zip(rows, text, strict=True)))
        hits.append(int(np.argmax(totals)) == one["label"])
    return hits


@needs_lm_eval
def test_a_task_scores_the_model_and_is_stored_beside_the_sets(here):
    own = ("--tasks", "toy_choice,toy_free", "--include-path", "tasks")
    output = printed("eval", "--model", "student", "--data", "rows.jsonl", "--greedy", "--max-new-tokens", 2, *own)
    assert "student on lm-eval-toy_choice: greedy" in output
    assert "standard error" in output
    found = scores("runs/eval/student/lm-eval-toy_choice")
    hits = expected_hits(here / "student")
    assert 0 < sum(hits) < len(hits)  # else a constant would do
    assert found["metrics"]["acc"] == {"mean": pytest.approx(np.mean(hits)), "sd": None, "values": [np.mean(hits)]}
    assert found["stderr"]["acc"] == pytest.approx(np.std(hits, ddof=1) / len(hits) ** 0.5)
    assert (found["set"], found["rows"], found["better"]) == ("lm-eval-toy_choice", 6, {"acc": "higher"})
    assert (found["task"]["name"], found["generation"]["num_fewshot"]) == ("toy_choice", {"toy_choice": 0})
    rows = answered("runs/eval/student/lm-eval-toy_choice")
    assert [row["scores"]["acc"] for row in rows] == [float(hit) for hit in hits]
    assert [row["prompt"] for row in rows] == [one["question"] for one in QUESTIONS]
    assert all(row["prediction"].strip() in one["choices"] for row, one in zip(rows, QUESTIONS, strict=True))
    assert scores("runs/eval/student/rows")["set"] == "rows"
    assert scores("runs/eval/student/lm-eval-toy_free")["metrics"].keys() == {"exact_match"}


@needs_lm_eval
def test_compare_report_and_card_read_the_scores_of_tasks(here):
    run = here / "run"
    (run / "model").mkdir(parents=True)
    (run / "config.resolved.yaml").write_text("loss: {name: kd}\ndata: {template: none}\n")
    for file in (here / "student").iterdir():
        (run / "model" / file.name).write_bytes(file.read_bytes())
    (run / "README.md").write_text("# run\n\n## How to load it\n\ncode\n")
    printed("eval", "--model", "run", "--model", "teacher", "--tasks", "toy_choice", "--include-path", "tasks")
    mean = np.mean(expected_hits(here / "student"))
    assert f"| lm-eval-toy\\_choice | acc | {mean:.2f} | 6 | 1 |" in (run / "README.md").read_text()
    table = printed("compare", "run", "runs/eval/teacher")
    assert "acc ↑" in table
    assert "(p " in table  # tested, by the scores of the questions
    both = json.loads(printed("compare", "run", "runs/eval/teacher", "--metrics", "acc", "--format", "json"))
    assert both["sets"][0]["cells"]["run"]["acc"]["mean"] == pytest.approx(mean)
    printed("report", "run", "--output", "page.html")
    assert "lm-eval-toy_choice" in Path("page.html").read_text()


@needs_lm_eval
def test_a_group_has_one_score_and_settings_are_recorded(here):
    printed(
        *("eval", "--model", "student", "--tasks", "toy_group", "--include-path", "tasks", "--limit", 4),
        *("--num-fewshot", 1, "--output", "out"),
    )
    found = scores("out/lm-eval-toy_group")
    assert set(found["metrics"]) == {"acc"}
    assert found["generation"]["num_fewshot"]["toy_choice"] == 1
    assert (found["generation"]["limit"], found["generation"]["chat_template"]) == (4, False)
    rows = answered("out/lm-eval-toy_group")
    assert [row["id"] for row in rows if row["scores"]] == [f"toy_choice/{i}" for i in range(4)]
    assert found["metrics"]["acc"]["mean"] == pytest.approx(np.mean([r["scores"]["acc"] for r in rows if r["scores"]]))
    assert all(row["prompt"].count("The ") == 2 for row in rows if row["scores"])  # one example before the question


@needs_lm_eval
def test_mistakes_are_said_before_a_model_is_loaded(here, monkeypatch):
    import lm_eval.tasks

    class OwnTasksOnly(lm_eval.tasks.TaskManager):
        def __init__(self, include_path=None, include_defaults=True):
            super().__init__(include_path=include_path, include_defaults=False)  # the index of all takes seconds

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", OwnTasksOnly)
    with pytest.raises(SettingsError, match=r"no task 'toy_choise'; did you mean toy_choice"):
        printed("eval", "--model", "nothing", "--tasks", "toy_choise", "--include-path", "tasks")
    monkeypatch.setattr("dpkd.data.hub.out_of_reach", lambda: True)
    with pytest.raises(
        DpkdError, match=r"the task far_away cannot be loaded: .*nobody/has-this.*A task needs the network until"
    ):
        printed("eval", "--model", "nothing", "--tasks", "far_away", "--include-path", "tasks")


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(DpkdError, match=r"needs the package lm-eval .*pip install 'dpkd\[tasks\]'"):
        load_tasks(["gsm8k"])
    with pytest.raises(SettingsError, match="--data or --tasks"):
        printed("eval", "--model", "student")


def test_names_and_templates():
    assert metric_name("exact_match,flexible-extract") == "exact_match_flexible_extract"
    plain, chat = type("T", (), {"chat_template": None}), type("T", (), {"chat_template": "{{x}}"})
    asked = [
        (TaskSettings(template=t).chat(plain), TaskSettings(template=t).chat(chat)) for t in ("auto", "chat", "none")
    ]
    assert asked == [(False, True), (True, True), (False, False)]
