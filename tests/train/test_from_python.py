"""dpkd.train, dpkd.resume and dpkd.evaluate with models and rows in memory."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from toy_runs import torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpkd
from dpkd import losses
from dpkd.errors import DpkdError, SettingsError
from dpkd.models.fingerprint import memory_fingerprint
from dpkd.run_metrics import read_metrics
from dpkd.train.progress import Display
from dpkd.train.resume import resume_folder

SHORT = {
    "train.steps": 3,
    "train.batch_size": 4,
    "train.device": "cpu",
    "train.lr": 1e-3,
    "train.log_every": 1,
    "text.sampling.max_new_tokens": 8,
    "text.teacher_sampling.max_new_tokens": 8,
}


@pytest.fixture
def models(toy: Path):
    """Teacher and student, loaded, without a way back to the folder that they came from."""
    both = [AutoModelForCausalLM.from_pretrained(toy / name) for name in ("teacher", "gpt2")]
    for model in both:
        model.name_or_path = model.config._name_or_path = ""
    return both


@pytest.fixture
def tokenizer(toy: Path):
    return AutoTokenizer.from_pretrained(toy / "teacher")


@pytest.fixture
def rows(toy: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (toy / "data.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder.model / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("loss", ["kd", "dpkd", "rkl"])
def test_objects_train_as_their_names_do(loss, toy, models, tokenizer, rows, tmp_path):
    """Where text is drawn, the ids of the rows decide what, and rows in memory have ids of their own."""
    drawn = loss != "kd"
    settings = SHORT | ({"text.source": "student"} if loss == "rkl" else {})
    teacher, student = models
    named = dpkd.train(
        loss=loss,
        teacher=str(toy / "teacher"),
        student=toy / "gpt2",
        data=toy / "data.jsonl",
        output=tmp_path / "named",
        settings=settings,
    )
    given = dpkd.train(
        loss=loss,
        teacher=teacher,
        student=student,
        data=toy / "data.jsonl" if drawn else rows,
        tokenizer=tokenizer,
        output=tmp_path / "given",
        settings=settings,
    )
    assert same(weights(named), weights(given))


def test_the_objects_are_left_as_they_are(models, tokenizer, rows, tmp_path):
    teacher, student = models
    teacher.train()
    student.transformer.wte.weight.requires_grad_(False)
    before = deepcopy([teacher.state_dict(), student.state_dict(), rows])
    flags = [[p.requires_grad for p in model.parameters()] for model in models]
    pad, state = tokenizer.pad_token, random.getstate()
    run = dpkd.train(
        loss="kd",
        teacher=teacher,
        student=student,
        data=rows,
        tokenizer=tokenizer,
        output=tmp_path / "run",
        settings=SHORT | {"student.lora": {"r": 2}, "student.dropout": "off"},
    )
    assert same(before[0], teacher.state_dict())
    assert same(before[1], student.state_dict())
    assert (before[2], pad) == (rows, tokenizer.pad_token)
    assert teacher.training
    assert not student.training
    assert student.transformer.drop.p > 0
    assert not hasattr(student, "peft_config")
    assert flags == [[p.requires_grad for p in model.parameters()] for model in models]
    assert not same(before[1], AutoModelForCausalLM.from_pretrained(run.model).state_dict())
    random.setstate(state)


def test_the_student_may_be_the_teacher_and_frozen_parameters_stay(models, tokenizer, rows, tmp_path):
    teacher = models[0]
    teacher.model.embed_tokens.weight.requires_grad_(False)
    run = dpkd.train(
        loss="rkl",
        teacher=teacher,
        student=teacher,
        data=rows,
        tokenizer=tokenizer,
        output=tmp_path / "run",
        settings=SHORT | {"loss.temperature": 2.0, "terms.lm.weight": 1.0},
    )
    after, before = weights(run), teacher.state_dict()
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_a_half_precision_student_is_trained_in_float32_unless_said_otherwise(models, tokenizer, rows, tmp_path):
    teacher, student = models[0], models[1].to(torch.bfloat16)
    for wanted, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        run = dpkd.train(
            loss="kd",
            teacher=teacher,
            student=student,
            data=rows,
            tokenizer=tokenizer,
            output=tmp_path / wanted,
            settings=SHORT | {"student.dtype": wanted},
        )
        assert {value.dtype for value in weights(run).values()} == {dtype}
    assert student.dtype == torch.bfloat16


def test_rows_may_be_a_dataset_or_an_endless_generator(toy, rows, tmp_path):
    from datasets import Dataset

    def endless():
        while True:
            yield from rows

    runs = [
        dpkd.train(
            loss="sft",
            student=toy / "gpt2",
            data=data,
            output=tmp_path / str(number),
            settings=SHORT | {"data.limit": len(rows)},
        )
        for number, data in enumerate((rows, Dataset.from_list(rows), endless()))
    ]
    facts = [json.loads(run.facts.read_text(encoding="utf-8")) for run in runs]
    assert len({fact["data"]["fingerprint"] for fact in facts}) == 1
    assert [fact["in_memory"]["in-memory:data"] for fact in facts] == ["list", "Dataset", "generator"]
    assert same(weights(runs[0]), weights(runs[1]))


def test_the_tokenizer_may_be_that_of_the_models_own_folder(toy, rows, tmp_path):
    student = AutoModelForCausalLM.from_pretrained(toy / "gpt2")
    run = dpkd.train(loss="sft", student=student, data=rows, output=tmp_path / "run", settings=SHORT)
    assert AutoTokenizer.from_pretrained(run.model).eos_token == "<eos>"


def test_run_json_and_the_card_say_what_was_in_memory(models, tokenizer, rows, tmp_path):
    teacher, student = models
    run = dpkd.train(
        loss="kd",
        teacher=teacher,
        student=student,
        data=rows,
        tokenizer=tokenizer,
        output=tmp_path / "run",
        settings=SHORT,
    )
    facts = json.loads(run.facts.read_text(encoding="utf-8"))
    assert facts["models"] == {"teacher": memory_fingerprint(teacher), "student": memory_fingerprint(student)}
    assert facts["in_memory"]["in-memory:teacher"] == "LlamaForCausalLM"
    assert facts["data"]["path"] == "in-memory:data"
    card = run.card.read_text(encoding="utf-8")
    assert "base_model" not in card
    assert "datasets:" not in card


def test_the_fingerprint_sees_one_weight_and_the_configuration(models):
    student = models[1]
    found = {memory_fingerprint(student), memory_fingerprint(deepcopy(student))}
    with torch.no_grad():
        student.lm_head.weight[5, 7] += 1e-3
    found.add(memory_fingerprint(student))
    student.config.layer_norm_epsilon *= 2
    found.add(memory_fingerprint(student))
    assert len(found) == 3


def test_resume_needs_the_same_objects(models, tokenizer, rows, tmp_path, stops):
    teacher, student = models
    objects = {"teacher": teacher, "student": student, "data": rows, "tokenizer": tokenizer}
    whole = dpkd.train(loss="kd", **objects, output=tmp_path / "whole", settings=SHORT)
    with stops(1, r"dpkd\.resume\('.*stopped', teacher=\.\.\., student=\.\.\., data=\.\.\.\)"):
        dpkd.train(loss="kd", **objects, output=tmp_path / "stopped", settings=SHORT)
    stopped = tmp_path / "stopped"
    with pytest.raises(SettingsError, match=r"teacher.model: in-memory:teacher refers to an object") as caught:
        resume_folder(stopped)
    assert len(caught.value.problems) == 3
    other = deepcopy(student)
    with torch.no_grad():
        other.lm_head.weight[0] += 1.0
    with pytest.raises(DpkdError, match=r"the student \(student.model\) changed"):
        dpkd.resume(stopped, **objects | {"student": other})
    with pytest.raises(DpkdError, match=r"the data \(data.path\) changed"):
        dpkd.resume(stopped, **objects | {"data": rows[:-1]})
    assert same(weights(dpkd.resume(stopped, **objects)), weights(whole))


def test_resume_refuses_an_object_that_the_run_did_not_begin_with(toy, rows, models, tmp_path, stops):
    with stops(1, "continue with: dpkd train --resume"):
        dpkd.train(loss="sft", student=toy / "gpt2", data=toy / "data.jsonl", output=tmp_path / "run", settings=SHORT)
    with pytest.raises(DpkdError, match="did not begin with in-memory:data: its settings name what it reads"):
        dpkd.resume(tmp_path / "run", data=rows)


def test_evaluate_takes_objects_and_leaves_them_alone(toy, models, tokenizer, rows):
    teacher, student = models
    student.train()
    named = dpkd.evaluate(
        str(toy / "gpt2"), str(toy / "data.jsonl"), teacher=str(toy / "teacher"), greedy=True, max_new_tokens=4, limit=6
    )
    given = dpkd.evaluate(student, rows, teacher=teacher, tokenizer=tokenizer, greedy=True, max_new_tokens=4, limit=6)
    assert student.training
    assert all(p.requires_grad for p in teacher.parameters())
    assert given.facts["set"] == "data"
    assert {"rouge_l", "forward_kl"} <= set(given.metrics)
    assert {n: m.values for n, m in given.metrics.items()} == {n: m.values for n, m in named.metrics.items()}


def test_a_run_whose_teacher_was_in_memory_is_evaluated_with_the_teacher_that_is_given(
    models, tokenizer, rows, tmp_path
):
    teacher, student = models
    run = dpkd.train(
        loss="kd",
        teacher=teacher,
        student=student,
        data=rows,
        tokenizer=tokenizer,
        output=tmp_path / "run",
        settings=SHORT,
    )
    how = {"greedy": True, "max_new_tokens": 4, "limit": 4}
    assert "forward_kl" not in dpkd.evaluate(run, rows, **how).metrics
    assert "forward_kl" in dpkd.evaluate(run, rows, teacher=teacher, tokenizer=tokenizer, **how).metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student": torch.nn.Linear(2, 2)}, "student: expected a name, a path, or a causal language model"),
        ({"student": 7}, r"but got int\. "),
        ({"data": 7}, "data: expected a name, a path, or an iterable of rows, but got int"),
        ({"data": {"train": []}}, "data: expected rows, but got a dict of train: give one split of it"),
        ({"data": ["red"]}, r"row:1: not a mapping: expected \{column: value\}, found 'red'"),
        ({"tokenizer": object()}, "tokenizer: belongs to a model in memory, and none was given"),
        ({"settings": {"data.split": "test"}}, r"data.split: has no effect on in-memory:data.*\(from settings\)"),
        ({"student": "in-memory:student"}, "refers to an object in the memory of another Python process"),
    ],
)
def test_what_cannot_be_used_is_explained(arguments, message, toy, rows, tmp_path):
    given = {"student": toy / "gpt2", "data": rows, "output": tmp_path / "run"} | arguments
    with pytest.raises(DpkdError, match=message):
        dpkd.train(loss="sft", **given)
    assert not (tmp_path / "run").exists()


def test_weights_in_memory_are_not_packed(models, tokenizer, rows):
    packed = {"teacher.quantization": "4bit"}
    with pytest.raises(DpkdError, match=r"teacher\.quantization: has no effect on in-memory:teacher"):
        dpkd.train(loss="kd", teacher=models[0], student=models[1], tokenizer=tokenizer, data=rows, settings=packed)


def test_a_model_without_a_tokenizer_is_explained(models, rows):
    with pytest.raises(DpkdError, match=r"has no tokenizer that could be found .*; pass one as tokenizer="):
        dpkd.train(loss="sft", student=models[1], data=rows)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_models_with_adapters_or_prepared_by_accelerate_are_refused(models, rows):
    from accelerate import Accelerator
    from peft import LoraConfig, get_peft_model

    teacher, student = models
    with pytest.raises(DpkdError, match=r"merge_and_unload\(\)"):
        dpkd.train(loss="sft", student=get_peft_model(teacher, LoraConfig(target_modules=["q_proj"])), data=rows)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(student)
    with pytest.raises(DpkdError, match=r"was prepared by accelerate; give accelerator.unwrap_model\(student, False\)"):
        dpkd.train(loss="sft", student=prepared, data=rows)


PROGRAM = """
import sys
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForCausalLM
import pathlib, torch, dpkd

accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
model = accelerator.prepare(AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/gpt2"))
before = accelerator.mixed_precision, accelerator.gradient_accumulation_steps, accelerator.process_index
common = dict(
    loss="kd", teacher=AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/teacher"),
    student=accelerator.unwrap_model(model, False), output=sys.argv[2],
    settings={"train.steps": 2, "train.batch_size": 4, "train.device": "cpu"},
)
said = pathlib.Path(sys.argv[2] + f"-{accelerator.process_index}.txt")
rows = [{"prompt": "red", "response": "blue " * (1 + i % 3)} for i in range(8)]
try:
    dpkd.train(data=rows[accelerator.process_index :], **common)
except Exception as error:
    said.write_text(str(error))
run = dpkd.train(data=Dataset.from_list(rows), **common)
assert before == (accelerator.mixed_precision, accelerator.gradient_accumulation_steps, accelerator.process_index)
assert accelerator.num_processes == 2
total = accelerator.reduce(torch.ones(()), reduction="sum")
assert total == 2
accelerator.end_training()
said.write_text(said.read_text() + f" | went on with {run.path}")
"""


def test_a_program_with_two_processes_of_its_own_goes_on_after_a_run(toy, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    port = 29500 + os.getpid() % 400
    done = torchrun(str(program), str(toy), str(tmp_path / "run"), port=port, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    refused = "the processes of this run differ in their data: give all of them the same"
    for process in (0, 1):
        said = (tmp_path / f"run-{process}.txt").read_text(encoding="utf-8")
        assert said == f"{refused} | went on with {tmp_path / 'run'}"
    assert (tmp_path / "run/model/model.safetensors").is_file()


def doubled_kl(student_logits, teacher_logits, factor: float = 2.0):
    """Twice the forward KL."""
    log_p, log_q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    return factor * (log_p.exp() * (log_p - log_q)).sum(-1)


def test_a_function_is_a_loss(models, tokenizer, rows, tmp_path):
    """With a factor of 1 it is fkl, bit for bit or nearly; its argument with a default is a setting."""
    teacher, student = models
    common = {"teacher": teacher, "student": student, "tokenizer": tokenizer, "data": rows}
    own = dpkd.train(
        loss=doubled_kl,
        **common,
        output=tmp_path / "own",
        settings={**SHORT, "loss.factor": 1.0, "train.save_every": 2},
    )
    named = dpkd.train(loss=losses.get("fkl"), **common, output=tmp_path / "named", settings=SHORT)
    found, wanted = (read_metrics(run.metrics) for run in (own, named))
    assert [m["loss/main"] for m in found] == pytest.approx([m["loss/main"] for m in wanted], rel=1e-5)
    shutil.rmtree(own.model)
    own.marker.unlink()  # as if it had not finished
    with pytest.raises(DpkdError, match="no loss is called 'doubled-kl'"):
        dpkd.resume(own, **common)
    assert dpkd.resume(own, loss=doubled_kl, **common).model.is_dir()
    html = own._repr_html_()
    assert str(own.path) in html
    assert "finished: step 3, loss" in html
    assert html.count("polyline") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.mean(), r"returned torch\.float32 \[\]; expected one number a row: float32 \[\d+\]"),
        (lambda values: values[:-1], r"returned torch\.float32 \[\d+\]; expected one number a row"),
        (lambda values: values.unsqueeze(0), r"returned torch\.float32 \[1, \d+\]; expected one number a row"),
        (lambda values: values.long(), r"returned torch\.int64 \[\d+\]; expected one number a row: float32"),
        (lambda values: None, r"returned NoneType; expected one number a row"),
        (lambda values: values.to("meta"), r"returned values on the device meta; expected cpu, where its inputs are"),
        (lambda values: values.detach(), r"returned values without a gradient: nothing would be learned"),
    ],
    ids=["mean", "short", "row", "integers", "nothing", "meta", "detached"],
)
def test_what_a_loss_returns_is_checked_at_the_first_step(change, message, models, tokenizer, rows, tmp_path):
    def loss(student_logits):
        return change(student_logits.logsumexp(-1))

    common = {"student": models[1], "tokenizer": tokenizer, "data": rows, "settings": SHORT}
    with pytest.raises(DpkdError, match=message):
        dpkd.train(loss=loss, **common, output=tmp_path / "run")
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert not (tmp_path / "run/model").exists()


def test_a_function_whose_arguments_are_no_signals():
    with pytest.raises(DpkdError, match=r"the function wrong has an argument 'logits'; expected .*student_logits"):
        dpkd.train(loss=wrong)
    with pytest.raises(DpkdError, match=r"reads nothing"):
        dpkd.train(loss=lambda: 0)


def wrong(logits):
    return logits


def test_settings_of_an_evaluation_may_name_their_block(models, tokenizer, rows):
    """`data.template` and `template` are one setting; the set in memory is called data."""
    student = models[1]
    how = {"tokenizer": tokenizer, "greedy": True, "max_new_tokens": 4, "limit": 2}
    texts = []
    for name in ("data.template", "template"):
        found = dpkd.evaluate(student, rows, settings={name: "alpaca"}, **how)
        texts.append((found.facts["generation"]["template"], found["rouge_l"]))
    assert texts[0] == texts[1]
    assert texts[0][0] == "alpaca"


def test_a_token_beyond_the_embedding_is_a_sentence(models, tokenizer, rows):
    student = models[1]
    student.resize_token_embeddings(50)
    with pytest.raises(DpkdError, match=r"row:1: contains the token \d+, but the model has embeddings for 50 only"):
        dpkd.evaluate(student, rows, tokenizer=tokenizer, greedy=True, max_new_tokens=2, limit=2)


def test_a_notebook_has_a_bar_and_no_line_for_each_step(capsys):
    console = Console(force_jupyter=True, file=io.StringIO())
    display = Display(console)
    with display.bar("training", 4, start=1):
        for step in (2, 3, 4):
            display.at(step, {"loss/total": 0.5})
    bar = capsys.readouterr().err
    assert "4/4" in bar
    assert "loss 0.500" in bar
    assert console.file.getvalue() == ""


@pytest.mark.parametrize("seeds", ["10,20", [10, 20], (10, 20), range(10, 30, 10)])
def test_seeds_are_integers_or_what_the_command_line_takes(seeds, toy, rows):
    teacher = str(toy / "teacher")
    assert dpkd.evaluate(teacher, rows, seeds=seeds, limit=1, max_new_tokens=2).seeds == (10, 20)


def test_one_seed_and_the_scores_as_a_mapping(toy, rows):
    scores = dpkd.evaluate(str(toy / "teacher"), rows, seeds=10, limit=1, max_new_tokens=2)
    assert scores.seeds == (10,)
    assert list(scores) == list(scores.metrics)
    assert len(scores) == len(scores.metrics)
    assert dict(scores)["rouge_l"] == scores["rouge_l"] == scores.metrics["rouge_l"].mean
    assert "rouge_l" in scores
    assert "seeds" not in scores


@pytest.mark.parametrize("seeds", [[], "", "10,x", "10,10", [10, 10], [1.5], 2.0, True, [True], {10: 1}, -1, b"10"])
def test_what_is_no_seed_is_said(seeds, toy, rows):
    with pytest.raises(SettingsError) as caught:
        dpkd.evaluate(str(toy / "teacher"), rows, seeds=seeds, limit=1)
    assert str(caught.value) == (
        "seeds: expected distinct integers, 0 or more, such as [10, 20] or '10,20', but got "
        f"{type(seeds).__name__} {seeds!r}; leave it out for the papers' five"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"settings": "train.lr=1"},
            r"settings: expected dotted paths .* \{'train.lr': 1e-4\}, but got str 'train.lr=1'",
        ),
        ({"settings": {1: 2}}, r"settings: expected dotted paths .*, but got dict \{1: 2\}"),
        ({"loss": 3}, r"loss: expected the name of a loss .* or a function, but got int 3"),
        ({"output": 5}, r"output: expected a folder, such as 'runs/mine', but got int 5"),
        ({"config": "run.yaml"}, r"config: expected a list of YAML files, .*, but got str 'run.yaml'"),
        ({"reward": 3}, r"reward: expected the name of a metric, .*, but got int 3"),
    ],
)
def test_an_argument_of_another_type_is_said(arguments, said, toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DpkdError, match=said):
        dpkd.train(**{"loss": "kd", "teacher": toy / "teacher", "student": toy / "gpt2", **arguments})
    assert not list(tmp_path.iterdir())


def test_python_names_its_own_arguments_for_rows_that_are_too_long(toy):
    rows = [{"prompt": "x" * 30, "response": "y"}]
    with pytest.raises(DpkdError) as caught:
        dpkd.evaluate(str(toy / "teacher"), rows, settings={"max_prompt_tokens": 20, "max_tokens": 25})
    advice = "settings={'data.max_prompt_tokens': 30, 'data.max_tokens': 286}"
    assert f"Every row must be scored: {advice}. To skip and count such rows: long_prompts='skip'" in str(caught.value)
    with pytest.raises(DpkdError, match=r"^data: there is no file nowhere.jsonl"):
        dpkd.evaluate(str(toy / "teacher"), "nowhere.jsonl")
    with pytest.raises(DpkdError, match=r"^data: there are no rows. Name a set that has some: data='FILE.jsonl'"):
        dpkd.evaluate(str(toy / "teacher"), [])


@pytest.mark.parametrize(("name", "value"), [("settings", "data.limit=1"), ("output", 5)])
def test_evaluate_says_it_too(name, value, toy, rows):
    with pytest.raises(SettingsError, match=rf"^{name}: expected .*, but got {type(value).__name__}"):
        dpkd.evaluate(str(toy / "teacher"), rows, **{name: value})
