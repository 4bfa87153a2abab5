"""`text.backend`: found, refused with reasons, and the same run whoever draws greedily."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from dpkd.api import Ability, SamplerSpec
from dpkd.errors import DpkdError, SettingsError
from dpkd.plugins import load_registry
from dpkd.train.rollouts import check_processes
from dpkd.train.run import train

PAGE = (Path(__file__).parents[2] / "docs/hooks.md").read_text(encoding="utf-8")
ECHO = "from dpkd.api import Ability, Sampled, SamplerSpec, hookimpl\n" + next(
    block for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL) if "class Echo" in block
)
STRANGER = {"DPKD_PLUGINS": "stranger"}
STUDENT = {"text.source": "student"}


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch):
    shutil.copy(Path(__file__).parents[1] / "fake_vllm.py", tmp_path / "vllm.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    yield
    sys.modules.pop("vllm", None)


def lines(folder) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    timed = ("seconds", "tokens_per_second", "peak_memory_mib")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


def test_built_in_ones_and_a_stranger_come_in_by_one_door(install_plugin):
    assert list(load_registry({}).all(SamplerSpec)) == ["hf", "vllm", "vllm-server"]
    install_plugin("stranger", {"echo": ECHO})
    assert list(load_registry(STRANGER).all(SamplerSpec)) == ["echo", "hf", "vllm", "vllm-server"]
    assert list(load_registry({"DPKD_PLUGINS": "nobody"}).all(SamplerSpec)) == ["hf", "vllm", "vllm-server"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("return [SamplerSpec(", "return ['x' or SamplerSpec("), "must return SamplerSpecs, but the list holds str"),
        (('"echo"', '"Ec ho"'), "the name 'Ec ho' should be lower-case letters"),
        (("open=Echo", "open=Echo, config=dict"), "the config of 'echo' must be a subclass of dpkd.api.SamplerConfig"),
    ],
)
def test_a_broken_one_is_listed_with_its_reason(install_plugin, change, reason):
    install_plugin("stranger", {"echo": ECHO.replace(*change)})
    registry = load_registry(STRANGER)
    assert list(registry.all(SamplerSpec)) == ["hf", "vllm", "vllm-server"]
    (broken,) = registry.broken
    assert reason in broken.reason


@pytest.mark.parametrize("entry_point", ["hf", "sampler.x"])
def test_a_name_that_is_taken_is_an_error_that_names_both(entry_point, install_plugin):
    install_plugin("stranger", {entry_point: ECHO.replace('"echo"', '"hf"')})
    with pytest.raises(DpkdError, match=r"two samplers are called 'hf': dpkd .*hf\.py\) and stranger 1\.0 \(.*\.py\)"):
        load_registry(STRANGER).get(SamplerSpec, "hf")


@pytest.mark.parametrize(
    ("loss", "changes", "message"),
    [
        ("rkl", {"text.backend": "vlm"}, "text.backend: no sampler is called 'vlm'; did you mean vllm?"),
        ("rkl", {"text.backend": "vllm"}, "text.backend: vllm cannot be used here: the package vllm is not installed"),
        ("rkl", {"text.backend_settings": {"gpu": 1}}, "text.backend_settings.gpu"),
        ("rkl", {"text.backend": "echo", "text.backend_settings": {"size": 1}}, "text.backend_settings.size"),
        ("opd", {"text.backend": "echo"}, "echo has no log-probs, which a rollout loss needs: it draws nothing"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(install_plugin, settings_of, loss, changes, message):
    install_plugin("stranger", {"echo": ECHO})
    with pytest.raises(SettingsError, match=re.escape(message)):
        settings_of(loss, {**STUDENT, **changes})


@pytest.mark.parametrize(
    ("loss", "changes", "ability"),
    [
        ("minillm", {"text.teacher_mix": 0.2}, Ability.TEACHER_MIX),
        ("opd", {"text.sampling.temperature": 0.7}, Ability.FILTERED_LOGPS),
        ("opd", {"text.sampling.top_k": 5}, Ability.FILTERED_LOGPS),
    ],
)
def test_what_vllm_lacks_is_refused_with_the_setting_that_asks_for_it(fake_vllm, settings_of, loss, changes, ability):
    with pytest.raises(SettingsError, match=f"vllm has no {ability.value}, which .* needs: "):
        settings_of(loss, {"text.source": "student", "text.teacher_mix": 0.0, "text.backend": "vllm", **changes})
    settings_of(loss, {"text.source": "student", **changes})


def test_a_backend_that_nobody_uses_need_not_work(settings_of):
    settings_of("kd", {"text.backend": "vllm"})


def test_several_processes_are_refused_where_a_sampler_works_in_one(fake_vllm, settings_of):
    resolved = settings_of("rkl", {**STUDENT, "text.backend": "vllm-server"})
    check_processes(resolved, 1)
    check_processes(settings_of("rkl", {**STUDENT, "text.backend": "vllm"}), 2)
    with pytest.raises(DpkdError, match="vllm-server works in one process only, and there are 2"):
        check_processes(resolved, 2)
    check_processes(settings_of("rkl", STUDENT), 2)


@pytest.mark.parametrize(
    "changes",
    [
        {**STUDENT, "text.sampling.temperature": 0.0},
        {"text.source": "teacher", "text.teacher_sampling.temperature": 0.0},
    ],
    ids=["student", "teacher"],
)
def test_greedy_text_gives_the_same_run_by_either_sampler(fake_vllm, settings_of, quiet, tmp_path, changes):
    """The student of the second step differs from that of the first: the engine must have got its weights."""
    runs = []
    for backend, own in (("hf", {}), ("vllm", {"dtype": "float32"})):
        more = {"text.backend": backend, "text.backend_settings": own, "output": str(tmp_path / backend)}
        runs.append(lines(train(settings_of("rkl", {**changes, "train.lr": 3e-2, **more}), console=quiet)))
    for mine, theirs in zip(*runs, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert sys.modules["vllm"].ENGINES
    stores = list((tmp_path / "cache" / "responses").glob("*"))
    assert len(stores) == (2 if changes["text.source"] == "teacher" else 0)


def test_a_rollout_loss_trains_on_what_vllm_draws(fake_vllm, settings_of, quiet):
    changes = {**STUDENT, "text.backend": "vllm", "text.teacher_mix": 0.0, "student.lora": {"r": 2}}
    rows = lines(train(settings_of("minillm", changes), console=quiet))
    assert len(rows) == 2
    assert "weights" in sys.modules["vllm"].ENGINES[-1].log


def test_the_command_checks_the_backend(tmp_path, toy):
    from typer.testing import CliRunner

    from dpkd.cli.main import app

    arguments = ["sample", "--model", str(toy / "teacher"), "--data", str(toy / "data.jsonl"), "--limit", "2"]
    arguments += ["--max-new-tokens", "3", "--output", str(tmp_path / "out.jsonl"), "--backend"]
    result = CliRunner().invoke(app, [*arguments, "vllm"])
    assert isinstance(result.exception, SettingsError)
    assert "--backend: vllm cannot be used here" in str(result.exception)
    assert CliRunner().invoke(app, [*arguments, "hf"]).exit_code == 0
    assert load_registry({}).get(SamplerSpec, "hf").spec.lacks == {}
