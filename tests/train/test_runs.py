"""Whole runs on toy models, through the door that the command line uses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from toy_runs import assert_same_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpkd.api import Family
from dpkd.errors import DpkdError
from dpkd.plugins import load_registry
from dpkd.run_folder import RunFolder
from dpkd.run_metrics import read_metrics
from dpkd.train import checkpoint, run
from dpkd.train.nonfinite import NotFinite
from dpkd.train.resume import resume_folder

PRETRAINED = {"student.init": "pretrained", "student.layers": None}
METRICS = (Path(__file__).parents[2] / "docs/metrics.md").read_text(encoding="utf-8")
# Documented with a word in capitals for what varies.
PATTERNS = ("reward/", "weighted/", "part/", "length/", "schedule/")
LOSSES = sorted(load_registry().losses)


def test_there_are_losses_to_sweep():
    assert len(LOSSES) >= 11


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_saves_and_logs(name, settings_of, quiet):
    resolved = settings_of(name)
    folder = run.train(resolved, console=quiet)
    model = AutoModelForCausalLM.from_pretrained(folder.model)
    ids = AutoTokenizer.from_pretrained(folder.model)("red cat", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, pad_token_id=256).shape[1] > ids["input_ids"].shape[1]
    lines = read_metrics(folder.metrics)
    assert [line["step"] for line in lines] == [1, 2]
    logged = {
        "loss/main",
        "weighted/main",
        "loss/total",
        "kl/forward",
        "kl/reverse",
        "nll/student",
        "gradient_norm",
        "lr",
        "tokens_per_second",
        "peak_memory_mib",
        "text/truncated_share",
    }
    if resolved.loss.family is Family.PAIR:
        logged |= {"reward/chosen", "reward/rejected", "reward/margin", "reward/accuracy", "length/chosen"}
    assert logged <= set(lines[0])
    undocumented = [key for key in lines[0] if f"`{key}`" not in METRICS and not key.startswith(PATTERNS)]
    assert not undocumented
    if resolved.loss.family is not Family.PAIR:
        writers = {
            response["writer"]
            for row in map(json.loads, folder.samples.read_text().splitlines())
            for response in row["responses"]
        }
        assert {f"length/{writer}" for writer in writers} <= lines[-1].keys() | lines[0].keys()
    assert lines[0]["gradient_norm"] > 0
    assert {p.name for p in folder.path.iterdir()} >= {
        "config.resolved.yaml",
        "run.json",
        "metrics.jsonl",
        "samples.jsonl",
        "checkpoints",
        "model",
        "README.md",
    }
    facts = json.loads(folder.facts.read_text())
    assert facts["data"]["fingerprint"]
    assert facts["versions"]["torch"]
    assert facts["loss"]["plugin"].startswith("dpkd ")


def test_terms_are_logged_unweighted_and_weighted(settings_of, toy, quiet):
    folder = run.train(
        settings_of(
            "rkl",
            {
                "terms.main": 0.5,
                "terms.lm.weight": 0.25,
                "terms.pretrain.weight": 2.0,
                "terms.pretrain.kd_ratio": 0.5,
                "terms.pretrain.corpus.path": str(toy / "corpus.txt"),
                "terms.pretrain.corpus.max_tokens": 32,
            },
        ),
        console=quiet,
    )
    line = read_metrics(folder.metrics)[0]
    for name, weight in (("main", 0.5), ("lm", 0.25), ("pretrain", 2.0)):
        assert line[f"weighted/{name}"] == pytest.approx(weight * line[f"loss/{name}"])
    assert line["loss/total"] == pytest.approx(sum(line[f"weighted/{n}"] for n in ("main", "lm", "pretrain")))
    # The LM term is the likelihood of the very tokens that the main loss is taken from.
    assert line["loss/lm"] == pytest.approx(line["nll/student"])


def test_sft_needs_no_teacher(settings_of, toy, quiet):
    folder = run.train(
        settings_of("sft", PRETRAINED | {"student.model": str(toy / "gpt2")}, teacher=None), console=quiet
    )
    line = read_metrics(folder.metrics)[-1]
    assert "kl/forward" not in line
    assert line["loss/main"] == pytest.approx(line["nll/student"])


def test_lora_trains_adapters_and_saves_a_merged_model(settings_of, quiet):
    folder = run.train(settings_of("kd", {"student.lora": {"r": 4}}), console=quiet)
    facts = json.loads(folder.facts.read_text())
    assert facts["parameters"]["trained"] < 0.5 * facts["parameters"]["student"]
    assert (folder.path / "adapter" / "adapter_model.safetensors").is_file()
    names = AutoModelForCausalLM.from_pretrained(folder.model).state_dict()
    assert not any("lora" in name for name in names)


def test_bf16_runs_with_float32_log_probs(settings_of, quiet, tmp_path):
    line = read_metrics(run.train(settings_of("kd", {"train.precision": "bf16"}), console=quiet).metrics)[0]
    exact = read_metrics(run.train(settings_of("kd", {"output": str(tmp_path / "fp32")}), console=quiet).metrics)[0]
    assert line["loss/main"] == pytest.approx(exact["loss/main"], rel=0.05)


@pytest.mark.parametrize(
    ("loss", "changes"),
    [
        ("kd", {}),
        ("dpkd", {"text.refresh": "every_n_steps", "text.every": 2}),
        ("minillm", {"text.every": 2, "text.num_iterations": 2, "student.dropout": "keep"}),
        ("rkl", {"text.source": "mixed", "text.mix": {"student": 0.5, "dataset": 0.5}}),
        ("distillm2", {"text.teacher_veto": 5}),
    ],
)
def test_an_interrupted_run_continues_bit_for_bit(loss, changes, settings_of, toy, quiet, stops, tmp_path):
    # GPT-2 with its dropout: the random numbers of training matter too.
    common = {
        "train.steps": 6,
        "train.log_every": 2,
        "student.init": "pretrained",
        "student.layers": None,
        "student.model": str(toy / "gpt2"),
    } | changes
    whole = run.train(settings_of(loss, common, teacher="gpt2"), console=quiet)

    with stops(3, "stopped after step 3; continue with: dpkd train --resume") as caught:
        run.train(settings_of(loss, common | {"output": str(tmp_path / "stopped")}, teacher="gpt2"), console=quiet)
    assert caught.value.exit_code == 130
    stopped = RunFolder(tmp_path / "stopped")
    assert not stopped.model.exists()
    assert checkpoint.latest(stopped.checkpoints).step == 3
    torch.manual_seed(999)  # whatever happened between
    continued = resume_folder(stopped.path, console=quiet)
    assert_same_model(whole, continued)
    # The line of step 4 covers step 3, which was done before the interruption.
    logged, uninterrupted = (read_metrics(folder.metrics) for folder in (continued, whole))
    assert [line["step"] for line in logged] == [1, 2, 4, 6]
    for line, expected in zip(logged, uninterrupted, strict=True):
        for name in ("seconds", "tokens_per_second", "peak_memory_mib"):
            line.pop(name), expected.pop(name)
        assert line == pytest.approx(expected, rel=1e-12)


def test_a_finished_run_is_not_resumed_and_a_used_folder_not_overwritten(settings_of, quiet):
    resolved = settings_of("sft")
    folder = run.train(resolved, console=quiet)
    with pytest.raises(DpkdError, match="is finished: its model is"):
        resume_folder(folder.path, console=quiet)
    with pytest.raises(DpkdError, match="holds a run already"):
        run.train(resolved, console=quiet)
    with pytest.raises(DpkdError, match="not a run folder"):
        resume_folder(folder.path.parent / "nothing", console=quiet)


def test_numbers_that_explode_name_the_culprit_and_keep_the_checkpoint(settings_of, quiet):
    resolved = settings_of("sft", {"train.lr": 1e30, "train.steps": 6, "train.save_every": 1, "train.clip": None})
    with pytest.raises(
        NotFinite, match=r"(weight|hidden states|logits|gradient).* not finite.*\n.*last good checkpoint"
    ) as caught:
        run.train(resolved, console=quiet)
    assert "step-0000000" in str(caught.value)
    assert checkpoint.latest(Path(resolved.settings.output) / "checkpoints") is not None


def test_a_half_written_checkpoint_is_never_chosen(tmp_path):
    (tmp_path / ".step-00000009.tmp").mkdir()
    (tmp_path / "step-00000007").mkdir()  # no state.json: it was never whole
    assert checkpoint.latest(tmp_path) is None
    (tmp_path / "step-00000004").mkdir()
    (tmp_path / "step-00000004" / "state.json").write_text("{}")
    assert checkpoint.latest(tmp_path).step == 4


@pytest.mark.parametrize(
    ("loss", "parts", "total"),
    [
        ("kd", ("nll", "kl"), lambda nll, kl: 0.5 * nll + 0.5 * kl),
        ("minillm", ("long", "single_step"), lambda long, single: long + single),
        ("dpkd-cpo", ("preference", "log_likelihood"), lambda preference, likelihood: preference - likelihood),
    ],
)
def test_the_parts_of_a_loss_add_up_to_it(loss, parts, total, settings_of, quiet):
    (first, *_) = read_metrics(run.train(settings_of(loss), console=quiet).metrics)
    assert first["loss/main"] == pytest.approx(total(*(first[f"part/{part}"] for part in parts)), rel=1e-5)


def test_the_reference_is_the_student_as_it_started(settings_of, toy, quiet, stops, tmp_path):
    """The first loss of dpo is log 2 at every pair; a resumed run compares with the same start."""
    changes = {"train.steps": 4, "train.lr": 1e-2, "loss.beta": 1.0, "terms.lm.weight": 0.0}
    whole = run.train(settings_of("dpo", changes), console=quiet)
    losses = [line["loss/main"] for line in read_metrics(whole.metrics)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[1] != losses[0]

    resolved = settings_of("dpo", changes | {"output": str(tmp_path / "stopped")})
    with stops(2):
        run.train(resolved, console=quiet)
    continued = resume_folder(tmp_path / "stopped", console=quiet)
    assert [line["loss/main"] for line in read_metrics(continued.metrics)] == losses
