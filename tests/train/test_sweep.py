"""A sweep: stages in order, each run once, failures listed, mistakes found before anything runs."""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from dpkd.errors import DpkdError, SettingsError
from dpkd.plugins import load_registry
from dpkd.run_folder import RunFolder
from dpkd.train import checkpoint, prepare, sweep_running, sweep_worker
from dpkd.train.children import Children, environment
from dpkd.train.sweep import read_sweep
from dpkd.train.sweep_runners import InProcess, Runner
from dpkd.train.sweep_running import run_sweep, summary


@pytest.fixture
def written(toy, tmp_path):
    """`written(changes)`: a file of a sweep over toy models."""

    def make(**changes):
        values = {
            "output": str(tmp_path / "runs"),
            "settings": {
                "teacher.model": str(toy / "teacher"),
                "data.path": str(toy / "data.jsonl"),
                "train.steps": 1,
                "train.device": "cpu",
            },
            "stages": {
                "start": {"settings": {"loss.name": "sft", "student.init": "layers", "student.layers": 2}},
                "distil": {
                    "settings": {"student.model": "{start}"},
                    "matrix": {"loss.name": ["kd", "rkl"], "train.lr": [1e-4, 1e-3]},
                },
            },
        }
        values |= changes
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return make


def test_the_runs_of_a_matrix_come_after_the_stage_that_they_share(written, tmp_path):
    plan = read_sweep(written())
    names = ["start", "distil-kd-lr_0.0001", "distil-kd-lr_0.001", "distil-rkl-lr_0.0001", "distil-rkl-lr_0.001"]
    assert [run.name for run in plan.runs] == names
    assert plan.runs[1].settings["student.model"] == str(tmp_path / "runs/start/model")
    assert (plan.runs[0].needs, plan.runs[1].needs) == ((), ("start",))


def test_runs_are_made_once_and_scored(written, toy, tmp_path):
    stages = yaml.safe_load(written().read_text())["stages"]
    stages["distil"]["matrix"] = {"loss.name": ["kd"]}
    how = {
        "data": [str(toy / "data.jsonl")],
        "stages": ["distil"],
        "options": {"greedy": True, "max_new_tokens": 4, "limit": 3},
    }
    path = written(stages=stages, evaluate=how)
    quiet = Console(quiet=True)
    assert run_sweep(read_sweep(path), console=quiet).done == ["start", "distil-kd"]
    scores = list((tmp_path / "runs/distil-kd/eval").rglob("scores.json"))
    assert json.loads(scores[0].read_text())["rows"] == 3
    assert not (tmp_path / "runs/start/eval").exists()
    again = run_sweep(read_sweep(path), console=quiet)
    assert (again.done, again.found) == ([], ["start", "distil-kd"])
    assert summary(again) == "0 runs done, 2 were there"


def test_an_evaluation_that_cannot_be_is_found_before_the_first_training(written, toy, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x" * 300, "response": "y"}) + "\n")
    how = {"data": [str(tmp_path / "long.jsonl")], "stages": ["distil"], "options": {"greedy": True}}
    with pytest.raises(DpkdError) as caught:
        run_sweep(read_sweep(written(evaluate=how)), console=Console(quiet=True))
    assert str(caught.value).startswith("nothing was begun, as distil-kd-lr_0.0001 could not be scored: ")
    assert str(caught.value).endswith(
        "Every row must be scored: evaluate: {options: {set: {max_prompt_tokens: 300}}} in the sweep's file. To skip "
        "and count such rows: evaluate: {options: {long_prompts: skip}} in the sweep's file"
    )
    assert not (tmp_path / "runs/start").exists()
    for data, said in (("nowhere.jsonl", "evaluate.data: there is no file nowhere.jsonl"), ("long.jsonl", "longer")):
        path = written(evaluate={"data": [data if data[0] == "n" else str(tmp_path / data)]})
        with pytest.raises(DpkdError, match=f"nothing was begun, as start could not be scored: .*{said}"):
            run_sweep(read_sweep(path), isolate=True, console=Console(quiet=True))


def test_why_a_run_failed_is_said_once(written, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_running, "check_evaluation", lambda *_: None)
    stages = {"one": {"settings": {"loss.name": "sft", "student.init": "layers", "student.layers": 2}}}
    path = written(stages=stages, evaluate={"data": ["nowhere.jsonl"], "options": {"greedy": True}})
    said = io.StringIO()
    outcome = run_sweep(read_sweep(path), console=Console(file=said, width=500))
    assert f"one: its evaluation failed, see {tmp_path / 'runs/one.log'}" in said.getvalue()
    assert "nowhere" not in said.getvalue()
    with pytest.raises(DpkdError, match=r"failed: one \(evaluation\): evaluate.data: there is no file nowhere.jsonl"):
        summary(outcome)


def test_a_failed_run_is_listed_and_the_others_go_on(written, tmp_path):
    stages = {
        "bad": {"settings": {"loss.name": "sft", "student.init": "layers", "student.layers": 9}},
        "good": {"settings": {"loss.name": "sft", "student.init": "layers", "student.layers": 2}},
        "later": {"settings": {"loss.name": "kd", "student.model": "{bad}"}},
    }
    outcome = run_sweep(read_sweep(written(stages=stages)), console=Console(quiet=True))
    assert outcome.done == ["good"]
    record = json.loads((tmp_path / "runs/sweep.json").read_text())["runs"]
    assert [(row["name"], row["stage"], row["state"]) for row in record] == [
        ("bad", "bad", "failed"),
        ("good", "good", "finished"),
        ("later", "later", "skipped"),
    ]
    assert "9 layers asked for" in record[0]["reason"]
    assert "9 layers asked for" in outcome.failed["bad"]
    assert outcome.skipped == {"later": "needs bad, which failed"}
    with pytest.raises(DpkdError, match=r"(?s)failed: bad: .*skipped: later: needs bad.*finished runs are skipped"):
        summary(outcome)


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        ({"a": {"settings": {"loss.name": "kdd"}}}, "a: loss: no loss is called 'kdd'"),
        ({"a": {"settings": {"loss.name": "kd", "student.model": "{b}"}}}, r"stages.a: uses {b}, but there is no"),
        ({"a": {"settings": {"student.model": "{b}"}}, "b": {"settings": {"student.model": "{a}"}}}, "wait for each"),
        ({"a": {"matrix": {"seed": [1, 2]}}, "b": {"settings": {"student.model": "{a}"}}}, "must be one run"),
        ({"a": {"setings": {}}}, "stages.a.setings: no such setting"),
    ],
)
def test_mistakes_are_found_before_anything_runs(stages, problem, written, tmp_path):
    with pytest.raises(SettingsError, match=problem):
        read_sweep(written(stages=stages))
    assert not Path(tmp_path / "runs").exists()


def test_a_mistake_of_many_runs_is_said_once(written, tmp_path):
    stages = {"all": {"settings": {"loss.name": "kd", "train.step": 3}, "matrix": {"seed": [1, 2, 3, 4]}}}
    path = written(stages=stages)
    with pytest.raises(SettingsError) as raised:
        read_sweep(path)
    said = [problem for problem in raised.value.problems if "train.step:" in problem]
    assert len(said) == 1
    assert said[0].startswith("all-seed_1, all-seed_2 and 2 more: train.step: no such setting")


def assert_same_model(one, other):
    """Weights and scores of two runs agree up to the last digits of float32.

    Products round by where their operands begin in memory and by the threads that share them.
    """
    from safetensors.torch import load_file
    from torch.testing import assert_close

    assert_close(*(load_file(folder / "model" / "model.safetensors") for folder in (one, other)), rtol=1e-5, atol=1e-6)
    scores = [
        {name: metric["values"] for name, metric in json.loads(file.read_text())["metrics"].items()}
        for folder in (one, other)
        for file in folder.rglob("scores.json")
    ]
    assert len(scores) in (0, 2)
    if scores:
        assert_close(*scores, rtol=1e-5, atol=1e-6)


def test_runs_that_share_one_process_are_those_that_have_one_each(written, toy, tmp_path):
    """Whatever ran before in the process: the same weights and scores."""
    values = yaml.safe_load(written().read_text())
    values["stages"]["distil"]["matrix"] = {"loss.name": ["kd", "dpkd"]}
    values["settings"] |= {"text.sampling.max_new_tokens": 6, "text.teacher_sampling.max_new_tokens": 6}
    how = {"data": [str(toy / "data.jsonl")], "options": {"seeds": 10, "max_new_tokens": 4, "limit": 3}}
    shared = read_sweep(written(**values, evaluate=how))
    assert run_sweep(shared, console=Console(quiet=True)).done == ["start", "distil-kd", "distil-dpkd"]
    alone = {"settings": {"student.model": str(tmp_path / "runs/start/model")}, "matrix": {"loss.name": ["dpkd"]}}
    values |= {"output": str(tmp_path / "apart"), "stages": {"distil": alone}}
    apart = read_sweep(written(**values, evaluate=how))
    assert run_sweep(apart, isolate=True, console=Console(quiet=True)).done == ["distil-dpkd"]
    assert_same_model(*(tmp_path / folder / "distil-dpkd" for folder in ("runs", "apart")))


def test_the_best_by_dev_stands_for_its_stage(written, toy, tmp_path):
    dev = {"dev.path": str(toy / "data.jsonl"), "dev.limit": 4, "dev.metric": "nll", "dev.max_new_tokens": 2}
    first = {"loss.name": "sft", "student.init": "layers", "student.layers": 2}
    stages = {
        "grid": {"settings": {**first, **dev}, "matrix": {"train.lr": [1e-7, 1e-2]}, "best_by_dev": True},
        "after": {"settings": {"loss.name": "kd", "student.model": "{grid}", "train.lr": "{grid.train.lr}"}},
    }
    plan = read_sweep(written(stages=stages))
    assert plan.runs[-1].settings["train.lr"] == 1e-7  # until the best is known
    outcome = run_sweep(plan, console=Console(quiet=True))
    assert outcome.done == ["grid-lr_1e_07", "grid-lr_0.01", "after"]
    settings = yaml.safe_load((tmp_path / "runs/after/config.resolved.yaml").read_text())
    assert settings["train"]["lr"] == 0.01
    assert settings["student"]["model"] == str(tmp_path / "runs/grid-lr_0.01/model")
    choices = tmp_path / "runs/choices.json"
    chosen = json.loads(choices.read_text())["grid"]
    assert chosen["chosen"] == {"train.lr": 0.01}
    assert chosen["values"]["grid-lr_0.01"] < chosen["values"]["grid-lr_1e_07"]
    dev_lines = tmp_path / "runs/grid-lr_0.01/dev.jsonl"
    for file, problem in (
        (choices, r"choices\.json is damaged"),
        (dev_lines, r"dev\.jsonl:1: expected one JSON object"),
    ):
        whole = file.read_bytes()
        file.write_bytes(b"{" + whole)
        with pytest.raises(DpkdError, match=problem):
            run_sweep(plan, console=Console(quiet=True))
        file.write_bytes(whole)


def test_no_run_begins_that_would_end_too_late(written, tmp_path):
    plan = read_sweep(written(budget_minutes=1e-6))
    outcome = run_sweep(plan, console=Console(quiet=True))
    assert (outcome.done, len(outcome.left)) == ([], 5)
    assert "call the sweep again" in summary(outcome)
    assert run_sweep(read_sweep(written()), console=Console(quiet=True)).done[0] == "start"


def test_assignments_change_all_runs_and_the_sweep(written, tmp_path):
    values = yaml.safe_load(written().read_text())
    values["settings"] |= {"student.init": "layers", "student.layers": 2}
    values["stages"]["start"]["settings"] = {"loss.name": "sft"}
    values["stages"]["distil"]["settings"] = {"student.model": "{start}", "student.init": "pretrained"}
    path = written(**values)
    changes = ["train.steps=3", f"output={tmp_path / 'other'}", "student.model=gpt2", "budget_minutes=2"]
    plan = read_sweep(path, assignments=changes)
    assert {run.settings["train.steps"] for run in plan.runs} == {3}
    assert plan.settings.budget_minutes == 2
    assert plan.runs[0].settings["student.model"] == "gpt2"
    assert "student.layers" not in plan.runs[0].settings
    assert plan.runs[1].settings["student.model"] == str(tmp_path / "other/start/model")


def test_an_option_of_the_evaluation_is_checked_before_anything_runs(written):
    how = {"data": ["x.jsonl"], "options": {"seed": 1, "set": {"max_tokens": 640}}}
    with pytest.raises(SettingsError, match=r"evaluate\.options\.seed"):
        read_sweep(written(evaluate=how))


def test_a_sweep_reads_a_file_once_and_again_when_it_has_changed(written, toy, tmp_path, monkeypatch):
    """One reading for the runs of `start` and `distil`, which train on responses; the file as it is now counts."""
    read = []
    real = prepare.read_examples
    monkeypatch.setattr(prepare, "read_examples", lambda *a, **k: read.append(a) or real(*a, **k))
    data = tmp_path / "data.jsonl"
    shutil.copy(toy / "data.jsonl", data)
    settings = yaml.safe_load(written().read_text())["settings"] | {"data.path": str(data)}
    plan = read_sweep(written(settings=settings))
    runner = InProcess(load_registry())
    (tmp_path / "runs").mkdir()
    for run in plan.runs[:3]:
        assert runner.train(plan, run) is None
    assert len(read) == 1
    data.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    assert runner.train(plan, plan.runs[3]) is None
    assert len(read) == 2
    kept = [json.loads((run.folder / "run.json").read_text())["data"]["kept"] for run in plan.runs[2:4]]
    assert kept[1] == kept[0] - 1


def test_no_checkpoint_is_written_at_the_end_where_none_is_kept(written, tmp_path, monkeypatch):
    saved = []
    real = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda folder, step, **k: saved.append(step) or real(folder, step, **k))
    stages = {"start": {"settings": {"loss.name": "sft", "student.init": "layers", "student.layers": 2}}}
    models = []
    for keep in (False, True):
        path = written(stages=stages, keep_checkpoints=keep, output=str(tmp_path / f"keep-{keep}"))
        assert run_sweep(read_sweep(path), console=Console(quiet=True)).done == ["start"]
        assert len(saved) == keep
        models.append((tmp_path / f"keep-{keep}/start/model/model.safetensors").read_bytes())
    assert models[0] == models[1]


def test_the_log_of_a_run_says_where_its_time_went(written, tmp_path):
    stages = {"start": {"settings": {"loss.name": "sft", "student.init": "layers", "student.layers": 2}}}
    run_sweep(read_sweep(written(stages=stages)), console=Console(quiet=True))
    log = (tmp_path / "runs/start.log").read_text()
    assert "timings: start, to the end of the first step" in log
    assert "timings: end" in log


@pytest.mark.parametrize("value", [5, "lr", [1]])
def test_settings_that_are_no_block_are_a_mistake_with_its_place(written, value):
    with pytest.raises(SettingsError, match="settings"):
        read_sweep(written(settings=value))


def test_processes_side_by_side_share_the_cores_unless_told(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert environment()["CUDA_VISIBLE_DEVICES"] == "7"
    assert "OMP_NUM_THREADS" not in environment()
    assert environment("1", 2) == {**os.environ, "CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "2"}
    assert environment("0", 8)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment("0", 8)["OMP_NUM_THREADS"] == "3"


def test_each_way_to_run_side_by_side_gives_its_share(written, tmp_path, monkeypatch):
    """Neither starts anything: what it would start a process with is recorded."""
    given = []
    monkeypatch.setattr(Children, "start", lambda self, module, arguments, **options: given.append(options["env"]))
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    plan, registry = read_sweep(written()), load_registry()
    (tmp_path / "runs").mkdir()
    for isolate in (False, True):
        (first, second) = sweep_running._runners(Children(), ["3", "5"], isolate, registry)
        first.train(plan, plan.runs[0])
        second.train(plan, plan.runs[0])
    told = [(env["CUDA_VISIBLE_DEVICES"], env["OMP_NUM_THREADS"]) for env in given]
    assert told == [("3", "4"), ("5", "4")] * 2


@pytest.fixture
def workers(monkeypatch):
    """The processes that a sweep on devices has started, in their order."""
    started = []
    real = Children.start

    def start(self, module, arguments, **options):
        started.append(real(self, module, arguments, **options))
        return started[-1]

    monkeypatch.setattr(Children, "start", start)
    return started


def test_a_process_for_each_device_makes_the_runs_of_one_process(written, toy, tmp_path, workers):
    """Two processes for six runs, the same weights and scores, and what was best by dev decides the others."""
    first = {"loss.name": "sft", "student.init": "layers", "student.layers": 2}
    dev = {"dev.path": str(toy / "data.jsonl"), "dev.limit": 4, "dev.metric": "nll", "dev.max_new_tokens": 2}
    lr = {"train.lr": "{grid.train.lr}", "student.model": "{grid}"}
    stages = {
        "grid": {"settings": first | dev, "matrix": {"train.lr": [1e-7, 1e-2]}, "best_by_dev": True},
        "after": {"settings": lr, "matrix": {"loss.name": ["kd", "rkl"]}},
        "other": {"settings": first, "matrix": {"train.lr": [1e-3, 1e-4]}},
    }
    how = {"data": [str(toy / "data.jsonl")], "stages": ["after"], "options": {"seeds": 10, "max_new_tokens": 4}}
    ends = {}
    for name, devices in (("alone", ()), ("beside", ("0", "0"))):
        plan = read_sweep(written(stages=stages, evaluate=how, output=str(tmp_path / name)))
        outcome = run_sweep(plan, devices=devices, console=Console(quiet=True))
        assert sorted(outcome.done) == sorted(run.name for run in plan.runs)
        ends[name] = [RunFolder(tmp_path / name / run.name) for run in plan.runs]
    assert [process.returncode for process in workers] == [0, 0]
    for one, other in zip(*ends.values(), strict=True):
        assert_same_model(one.path, other.path)
    assert len(list((tmp_path / "beside").rglob("scores.json"))) == 2
    for name in ("after-kd", "after-rkl"):
        settings = yaml.safe_load((tmp_path / "beside" / name / "config.resolved.yaml").read_text())
        assert settings["train"]["lr"] == 0.01
    assert "timings: end" in (tmp_path / "beside/after-kd.log").read_text()


def test_a_process_that_dies_fails_its_run_and_another_goes_on(written, tmp_path, workers, monkeypatch):
    real = sweep_worker._write

    def write(stream, values):
        if values.get("run", {}).get("name") == "distil-kd-lr_0.0001":
            workers[-1].kill()
            workers[-1].wait()
        real(stream, values)

    monkeypatch.setattr(sweep_worker, "_write", write)
    outcome = run_sweep(read_sweep(written()), devices=["0"], console=Console(quiet=True))
    assert outcome.failed == {
        "distil-kd-lr_0.0001": f"its process ended with exit code -9, see {tmp_path / 'runs/worker-1.log'}"
    }
    assert outcome.done == ["start", "distil-kd-lr_0.001", "distil-rkl-lr_0.0001", "distil-rkl-lr_0.001"]
    assert [process.returncode for process in workers] in ([-9, 0], [-9, 143])  # with the thread that started it


def test_what_has_loaded_models_makes_the_next_run(written, monkeypatch):
    made = []

    class Fake(Runner):
        def __init__(self, _started, device, number, workers):
            self.name = f"{number} of {workers} on {device}"

        def evaluate(self, plan, run):
            raise AssertionError

        def train(self, plan, run):
            made.append(self.name)
            RunFolder(run.folder).model.mkdir(parents=True)
            RunFolder(run.folder).marker.write_text("{}")

    monkeypatch.setattr(sweep_running, "Worker", Fake)
    sft = {"loss.name": "sft", "student.init": "layers", "student.layers": 2}
    chain = {"loss.name": "kd"}
    stages = {
        "a": {"settings": sft},
        "b": {"settings": {**chain, "student.model": "{a}"}},
        "c": {"settings": {**chain, "student.model": "{b}"}},
    }
    run_sweep(read_sweep(written(stages=stages)), devices=["7", "8"], console=Console(quiet=True))
    assert made == ["1 of 2 on 7"] * 3


@pytest.mark.parametrize("devices", [["0", "1"], ["0"]])
def test_a_stage_begins_when_those_that_it_needs_are_over(devices, written, monkeypatch):
    """`slow` ends after `late`, which needs `fast` alone; a second seed waits until all runs with the first are out."""
    late, order = threading.Event(), []
    if len(devices) == 1:
        late.set()

    class Fake(Runner):
        def __init__(self, *_):
            pass

        def evaluate(self, plan, run):
            raise AssertionError

        def train(self, plan, run):
            assert run.stage != "slow" or late.wait(60)
            order.append(run.name)
            RunFolder(run.folder).model.mkdir(parents=True)
            RunFolder(run.folder).marker.write_text("{}")
            if run.name == "late-seed_1":
                late.set()

        def close(self):
            order.append("closed")

    monkeypatch.setattr(sweep_running, "Worker", Fake)
    sft = {"loss.name": "sft", "student.init": "layers", "student.layers": 2}
    stages = {
        "fast": {"settings": sft},
        "slow": {"settings": sft},
        "late": {"settings": {"loss.name": "kd", "student.model": "{fast}"}},
        "last": {"settings": {"loss.name": "kd", "student.model": "{slow}"}},
    }
    plan = read_sweep(written(stages=stages, seeds=[1, 2]))
    outcome = run_sweep(plan, devices=devices, console=Console(quiet=True))
    assert len(outcome.done) == 6
    assert order[6:] == ["closed"] * len(devices)
    if len(devices) == 2:
        assert order[:3] == ["fast", "late-seed_1", "slow"]
        assert set(order[3:6]) == {"last-seed_1", "late-seed_2", "last-seed_2"}
    else:
        assert order[:6] == ["fast", "slow", "late-seed_1", "last-seed_1", "late-seed_2", "last-seed_2"]
