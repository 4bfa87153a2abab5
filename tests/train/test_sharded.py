"""A student that FSDP has spread over two processes gives what one process gives, and is sampled, scored and saved."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fake_teacher_server import FakeServer
from toy_runs import assert_same_weights, torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpkd.run_metrics import read_metrics
from dpkd.train import run


@pytest.mark.parametrize(
    ("loss", "changes"),
    [
        ("dpkd", {"text.every": 1, "dev.every": 1, "dev.limit": 3, "dev.max_new_tokens": 4}),
        ("minillm", {"student.lora": {"r": 2}}),
        ("jsd", {"train.compile": "on", "text.source": "student"}),  # the whole one is not compiled
    ],
)
def test_a_sharded_student_gives_what_a_whole_one_gives(loss, changes, settings_of, toy, quiet, tmp_path):
    changes = {
        "train.batch_size": 7,
        "train.micro_batch_size": 4,
        "student.init": "layers",
        "student.layers": 2,
        "train.steps": 2,
        "train.log_every": 1,
        "train.device": "cpu",
        "train.lr": 1e-3,
        "train.warmup_steps": 0,
        "text.sampling.max_new_tokens": 8,
        "text.teacher_sampling.max_new_tokens": 8,
        **changes,
    }
    if "dev.every" in changes:
        changes["dev.path"] = str(toy / "data.jsonl")
    one = run.train(settings_of(loss, changes | {"train.compile": "off"}), console=quiet)
    args = ["train", "--loss", loss, "--teacher", str(toy / "teacher"), "--data", str(toy / "data.jsonl")]
    args += ["--output", str(tmp_path / "two")]
    for path, value in changes.items():
        args += ["--set", f"{path}={value}"]
    program, port = str(Path(__file__).with_name("train_sharded.py")), 30100 + os.getpid() % 400
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = torchrun(program, *args, port=port, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    if "train.compile" in changes:
        assert "compiled: the student's layers, the teacher's layers" in done.stdout
    for name in ("model", "adapter"):
        if not (one.path / name).exists():
            continue
        file = "model.safetensors" if name == "model" else "adapter_model.safetensors"
        assert_same_weights(*(folder / name / file for folder in (one.path, tmp_path / "two")))
    ours, theirs = read_metrics(tmp_path / "two" / "metrics.jsonl")[-1], read_metrics(one.metrics)[-1]
    assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-4)
    assert ours["text/responses"] == theirs["text/responses"]
    if "dev.path" in changes:
        assert (tmp_path / "two" / "dev.jsonl").read_text().count("\n") == 2


def test_a_sharded_student_chooses_the_ids_that_a_server_scores(settings_of, toy, quiet, tmp_path):
    gpt2, tokenizer = (of.from_pretrained(toy / "gpt2") for of in (AutoModelForCausalLM, AutoTokenizer))
    server = FakeServer(gpt2, tokenizer)
    student = {"student.init": "pretrained", "student.layers": None, "student.model": str(toy / "teacher")}
    changes = {"teacher.server": f"{server.url}/v1", "loss.k": 4, "text.source": "dataset", "train.batch_size": 7}
    changes |= {**student, "train.micro_batch_size": 4}
    one = run.train(settings_of("topk-jsd", changes, teacher=None), console=quiet)
    args = ["train", "--loss", "topk-jsd", "--data", str(toy / "data.jsonl"), "--output", str(tmp_path / "two")]
    fixed = {"train.steps": 2, "train.log_every": 1, "train.device": "cpu", "train.lr": 1e-3, "train.warmup_steps": 0}
    for path, value in {**fixed, **changes}.items():
        args += ["--set", f"{path}={value if value is not None else 'none'}"]
    program, port = str(Path(__file__).with_name("train_sharded.py")), 30100 + os.getpid() % 400
    done = torchrun(program, *args, port=port, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    server.close()
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_weights(*(folder / "model" / "model.safetensors" for folder in (one.path, tmp_path / "two")))
