"""What comes from a run folder never decides what code runs, nor does what lies in the working directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from faults import dpkd
from toy_commands import TRAIN, write_toy

from dpkd.run_folder import RunFolder

EVIL = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({target!r}).write_text("the code ran")
class Model(LlamaForCausalLM):
    pass
class Config(LlamaConfig):
    pass
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Toy models, data and a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    write_toy(folder / "toy")
    assert dpkd([*TRAIN, "--set", "train.steps=1"], folder / "here").kind == "ok"
    return folder


@pytest.fixture
def foreign(trained, tmp_path):
    """A finished run from somebody else, whose settings name a teacher with a script and trust it."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "here/run"
    teacher = run / "teacher"
    shutil.copytree(tmp_path / "toy/model", teacher)
    (teacher / "evil.py").write_text(EVIL.format(target=str(tmp_path / "ran")))
    config = json.loads((teacher / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}
    (teacher / "config.json").write_text(json.dumps(config))
    settings = yaml.safe_load((run / "config.resolved.yaml").read_text())
    settings["teacher"] |= {"model": str(teacher), "trust_remote_code": True}
    (run / "config.resolved.yaml").write_text(yaml.safe_dump(settings))
    marker = json.loads((run / "finished.json").read_text())
    marker["records"] |= RunFolder(run).records()  # whoever writes the settings writes their checksum too
    (run / "finished.json").write_text(json.dumps(marker))
    return tmp_path


CALLS = {
    "eval": ["eval", "--model", "run", "--data", "../toy/data.jsonl", "--greedy", "--max-new-tokens", "2"],
    "report": ["report", "run", "--token-rewards", "1", "--no-figures"],
    "resume": ["train", "--resume", "run", "--set", "train.steps=2"],
}


@pytest.mark.parametrize("name", CALLS)
def test_a_run_folder_does_not_decide_that_code_runs(name, foreign: Path):
    refused = dpkd(CALLS[name], foreign / "here")
    assert not (foreign / "ran").exists()
    assert (refused.kind, refused.code) == ("refused", 1), refused.text
    assert "config.resolved.yaml asks to run Python code that comes with the teacher" in refused.text
    assert "--trust-remote-code" in refused.text


def test_the_present_command_may_allow_it(foreign: Path):
    dpkd([*CALLS["eval"], "--trust-remote-code"], foreign / "here")
    assert (foreign / "ran").exists()


def test_a_model_with_a_script_is_refused_without_the_flag(foreign: Path):
    call = ["eval", "--model", "run/teacher", "--data", "../toy/data.jsonl", "--greedy", "--max-new-tokens", "2"]
    refused = dpkd([*call, "--output", "scores"], foreign / "here")
    assert not (foreign / "ran").exists()
    assert (refused.kind, refused.code) == ("refused", 1), refused.text


def test_a_module_of_our_name_in_the_working_directory_is_not_run(tmp_path):
    write_toy(tmp_path / "toy")
    here = tmp_path / "here"
    here.mkdir()
    for name in ("dpkd.py", "typer.py", "ctypes.py"):
        (here / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit('not ours')\n")
    settings = {
        "output": "runs",
        "settings": {"teacher.model": "../toy/model", "data.path": "../toy/data.jsonl", "train.steps": 1},
        "stages": {"one": {"settings": {"loss.name": "kd", "student.init": "layers", "student.layers": 1}}},
    }
    (here / "sweep.yaml").write_text(yaml.safe_dump(settings))
    command = Path(sys.executable).with_name("dpkd")
    done = subprocess.run([str(command), "sweep", "sweep.yaml"], cwd=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()
    assert (here / "runs/one/finished.json").is_file()
