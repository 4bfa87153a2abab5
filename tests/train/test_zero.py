"""DeepSpeed's ZeRO over two CPU processes gives what one process gives, is sampled, scored, saved and resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file
from toy_runs import assert_same_weights, torchrun

from dpkd.run_metrics import read_metrics
from dpkd.train import run

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'dpkd[deepspeed]'")

CHANGES = {
    "train.batch_size": 7,
    "train.micro_batch_size": 4,
    "train.log_every": 1,
    "text.sampling.max_new_tokens": 8,
    "text.teacher_sampling.max_new_tokens": 8,
}


def zero_environment(stage: int, tmp_path: Path) -> dict[str, str]:
    """What `accelerate launch --use_deepspeed --deepspeed_config_file FILE` sets."""
    # A toy's weights are so small that stage 3 would keep them whole.
    config = {"stage": stage, "stage3_param_persistence_threshold": 0}
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": config}))
    given = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    return {**os.environ, **given, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def in_two(stage: int, tmp_path: Path, *arguments: str):
    """`dpkd ARGUMENTS` in two processes."""
    port = 30500 + (os.getpid() + 7 * stage) % 400
    return torchrun("-m", "dpkd.cli.main", *arguments, port=port, env=zero_environment(stage, tmp_path))


def as_arguments(settings, loss: str, output: Path, changes: dict) -> list[str]:
    """The command line of a toy run."""
    given = ["train", "--loss", loss, "--teacher", settings.teacher.model, "--data", settings.data.path]
    given += ["--output", str(output), "--set", f"train.steps={settings.train.steps}"]
    fixed = {"train.lr": 1e-3, "train.warmup_steps": 0, "train.device": "cpu", "student.init": "layers"}
    for path, value in {**fixed, "student.layers": 2, **changes}.items():
        given += ["--set", f"{path}={value}"]
    return given


@pytest.mark.parametrize(
    ("stage", "loss", "changes"),
    [
        (1, "minillm", {"student.lora": {"r": 2}}),
        (2, "jsd", {"text.source": "student"}),
        (3, "dpkd", {"text.every": 1, "dev.every": 1, "dev.limit": 3, "dev.max_new_tokens": 4}),
        (3, "minillm", {"student.lora": {"r": 2}}),
        (3, "hidden-mse", {}),
    ],
)
def test_each_stage_gives_what_one_process_gives(stage, loss, changes, settings_of, toy, quiet, tmp_path):
    changes = {**CHANGES, **changes}
    if "dev.every" in changes:
        changes["dev.path"] = str(toy / "data.jsonl")
    resolved = settings_of(loss, changes)
    one, two = run.train(resolved, console=quiet).path, tmp_path / "two"
    done = in_two(stage, tmp_path, *as_arguments(resolved.settings, loss, two, changes))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_weights(one / "model" / "model.safetensors", two / "model" / "model.safetensors")
    if "student.lora" in changes:
        assert_same_weights(*(folder / "adapter" / "adapter_model.safetensors" for folder in (one, two)))
    for ours, theirs in zip(*(read_metrics(folder / "metrics.jsonl") for folder in (two, one)), strict=True):
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-4)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
        assert ours.get("text/responses") == theirs.get("text/responses")
    if "dev.path" in changes:
        assert (two / "dev.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_goes_on_from_its_checkpoint_with_and_without_zero(stage, settings_of, quiet, tmp_path):
    """What two steps of ZeRO and two further ones of one process give, or of ZeRO, is what four of one process give."""
    four = run.train(settings_of("kd", {**CHANGES, "train.steps": 4, "train.schedule": "constant"}), console=quiet)
    short = settings_of("kd", {**CHANGES, "train.steps": 2, "train.schedule": "constant"})
    two = tmp_path / "two"
    again = ["--set", "train.steps=4"]
    arguments = as_arguments(short.settings, "kd", two, {**CHANGES, "train.schedule": "constant"})
    done = in_two(stage, tmp_path, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    state = load_file(two / "checkpoints" / "step-00000002" / "optimizer.safetensors")
    assert {key.rpartition("|")[2] for key in state} == {"step", "exp_avg", "exp_avg_sq"}
    assert all(float(value) == 2.0 for key, value in state.items() if key.endswith("|step"))
    if stage == 3:
        done = in_two(stage, tmp_path, "train", "--resume", str(two), *again)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        from typer.testing import CliRunner

        from dpkd.cli.main import app

        result = CliRunner().invoke(app, ["train", "--resume", str(two), *again])
        assert result.exit_code == 0, result.output
    assert_same_weights(four.path / "model" / "model.safetensors", two / "model" / "model.safetensors")


def test_a_step_that_is_not_finite_changes_no_weight(settings_of, tmp_path):
    resolved = settings_of("kd", {**CHANGES, "train.steps": 4})
    changes = {**CHANGES, "train.lr": 1e30, "train.clip": None, "train.save_every": 1}
    done = in_two(2, tmp_path, *as_arguments(resolved.settings, "kd", tmp_path / "two", changes))
    assert done.returncode != 0
    assert "training stopped" in done.stdout + done.stderr
    assert "is not finite" in done.stdout + done.stderr
    assert "unexpected error" not in done.stdout + done.stderr


def test_what_zero_cannot_do_is_said_at_once(settings_of, monkeypatch, tmp_path):
    from dpkd.errors import DpkdError
    from dpkd.train.zero import check_zero

    for name, value in zero_environment(2, tmp_path).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "deepspeed.json").write_text(
        json.dumps({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}, "gradient_clipping": 0.5})
    )
    changes = {"train.optimizer": "adafactor", "train.ema": 0.9, "batch.probe": True}
    with pytest.raises(DpkdError) as caught:
        check_zero(settings_of("kd", changes).settings)
    for said in ("optimizer: {'type': 'Adam'}", "gradient_clipping: 0.5", "adafactor", "train.ema", "batch.probe"):
        assert said in str(caught.value)
