"""Several losses in one run, each with its weight, settings and text; and settings that follow the step."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_invariants import assert_same, gradients
from toy_runs import assert_same_model

from dpkd.config.settings import ScheduleSettings
from dpkd.errors import SettingsError
from dpkd.run_metrics import read_metrics
from dpkd.train import run
from dpkd.train.loss_module import LossModule
from dpkd.train.resume import resume_folder
from dpkd.train.schedules import LossPace, scheduled

KL = {"loss": "kd", "settings": {"kd_ratio": 1.0}}


def _same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-12)


def test_two_losses_are_one_that_mixes_them(settings_of, quiet):
    """kd is 0.5 · cross-entropy + 0.5 · KL: by itself, as sft beside kd's KL, and as its own LM term."""
    whole, _, train_step = gradients(settings_of("kd"), quiet)
    forwards = train_step.teacher.forwards
    parts = {"terms.main": 0.5, "loss.kd_ratio": 1.0, "terms.extra.ce": {"loss": "sft", "weight": 0.5}}
    split, metrics, train_step = gradients(settings_of("kd", parts), quiet)
    _same(split, whole)
    assert {"loss/main", "loss/ce"} <= metrics.keys()
    assert train_step.teacher.forwards == forwards, "losses of one text share its forward"
    term = {"terms.main": 0.5, "loss.kd_ratio": 1.0, "terms.lm.weight": 0.5}
    _same(gradients(settings_of("kd", term), quiet)[0], whole)


PAIRS = [
    {"prompt": f"say {word}", "chosen": f" {word} {word}" + " again" * i, "rejected": f" not {word} at all"}
    for i, word in enumerate(("red", "blue", "cat", "dog"))
]


@pytest.mark.parametrize("micro", [8, 2])
def test_the_lm_term_of_preference_pairs_comes_from_their_own_pass(micro, settings_of, quiet, tmp_path, monkeypatch):
    """The gradient of the pairs and of the chosen responses' likelihood; the student runs as often as without it."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    given = {"data.path": str(tmp_path / "pairs.jsonl"), "train.batch_size": 4, "train.micro_batch_size": micro}
    pairs = given | {"text.source": "preference"}
    forwards, real = [], LossModule.forward
    monkeypatch.setattr(LossModule, "forward", lambda self, *a, **k: forwards.append(1) or real(self, *a, **k))
    alone = gradients(settings_of("dpkd", pairs | {"terms.lm.weight": 0.0}), quiet)[0]
    passes = len(forwards)
    chosen, of_chosen, _ = gradients(settings_of("sft", given | {"data.drop_rejected": True}), quiet)
    forwards.clear()
    found, metrics, _ = gradients(settings_of("dpkd", pairs | {"terms.lm.weight": 0.5}), quiet)
    assert len(forwards) == passes
    assert_same(found, {name: alone[name] + 0.5 * chosen[name] for name in alone})
    assert metrics["loss/lm"] == pytest.approx(of_chosen["loss/main"], rel=1e-6)


def test_the_lm_term_of_other_pairs_has_a_pass_of_its_own(settings_of, quiet):
    """The chosen responses are the teacher's there, and the likelihood is that of the data set's."""
    metrics = gradients(settings_of("dpkd", {"terms.lm.weight": 0.5}), quiet)[1]
    own = gradients(settings_of("sft"), quiet)[1]
    assert metrics["loss/lm"] == pytest.approx(own["loss/main"], rel=1e-9)


def test_a_loss_with_a_text_of_its_own_adds_its_own_gradient(settings_of, quiet):
    """Preference pairs beside distillation on the data set, and on teacher text: the gradients add up."""
    pairs, data = (
        gradients(settings_of("dpkd", {"terms.lm.weight": 0.0}), quiet)[0],
        gradients(settings_of("rkl"), quiet)[0],
    )
    teacher = gradients(settings_of("rkl", {"text.source": "teacher"}), quiet)[0]
    extra = {
        "terms.lm.weight": 0.0,
        "terms.extra.far": {"loss": "rkl", "weight": 0.25},
        "terms.extra.near": {
            "loss": "rkl",
            "weight": 2.0,
            "text": {"source": "teacher", "teacher_sampling": {"max_new_tokens": 8}},
        },
    }
    found, metrics, _ = gradients(settings_of("dpkd", extra), quiet)
    _same(found, {name: pairs[name] + 0.25 * data[name] + 2.0 * teacher[name] for name in found})
    assert {"loss/main", "loss/far", "loss/near"} <= metrics.keys()


def test_a_run_with_several_losses_logs_each_and_resumes(settings_of, quiet, stops, tmp_path):
    changes = {
        "train.steps": 4,
        "terms.extra.own": {
            "loss": "rkl",
            "weight": 0.5,
            "text": {"source": "student", "refresh": "every_n_steps", "every": 2, "sampling": {"max_new_tokens": 6}},
        },
        "schedules.temperature": {"start": 1.0, "end": 2.0, "shape": "by-loss", "rate": 0.5},
    }
    whole = run.train(settings_of("kd", changes), console=quiet)
    (first, *_, last) = read_metrics(whole.metrics)
    assert first["loss/total"] == pytest.approx(first["loss/main"] + 0.5 * first["loss/own"])
    assert first["weighted/own"] == pytest.approx(0.5 * first["loss/own"])
    assert first["text/own/responses"] == 4
    assert (first["schedule/temperature"], last["schedule/temperature"]) == (1.0, 2.0)

    resolved = settings_of("kd", changes | {"output": str(tmp_path / "stopped")})
    with stops():
        run.train(resolved, console=quiet)
    continued = resume_folder(tmp_path / "stopped", console=quiet)
    assert_same_model(whole, continued)
    values = [[line["schedule/temperature"] for line in read_metrics(f.metrics)] for f in (whole, continued)]
    assert values[0] == values[1]


def test_the_value_that_the_loss_reads_is_the_scheduled_one(settings_of, quiet, tmp_path):
    """One step at kd_ratio 1 is one step of a run with that setting, whatever its own setting is."""
    common = {"train.steps": 1, "train.batch_size": 2}
    fixed = run.train(settings_of("kd", {**common, "loss.kd_ratio": 1.0}), console=quiet)
    moving = {**common, "schedules.kd_ratio": {"start": 1.0, "end": 0.5}, "output": str(tmp_path / "moving")}
    moved = run.train(settings_of("kd", moving), console=quiet)
    assert_same_model(fixed, moved)


def test_shapes():
    cosine = ScheduleSettings(shape="cosine", start=2.0, end=1.0)
    assert [scheduled(cosine, step, 5) for step in range(5)] == pytest.approx(
        [1.5 + 0.5 * math.cos(math.pi * step / 4) for step in range(5)]
    )
    assert scheduled(ScheduleSettings(start=0.3, end=0.9), 0, 1) == 0.3


def test_by_loss_is_taids_rule():
    """Two falls of the loss by hand: δ = 0.5, then 0.2, with β = 0.5 and α = 0.1."""
    settings = ScheduleSettings(shape="by-loss", start=0.4, end=1.0, rate=0.1, momentum=0.5)
    pace = LossPace(0.4)
    for loss in (10.0, 5.0, 4.0):
        pace.follow(loss, settings)
    first = 0.4 + 0.1 / (1 + math.exp(-0.25)) * 0.6
    second = first + 0.1 / (1 + math.exp(-(0.5 * 0.25 + 0.5 * 0.2))) * (1.0 - first)
    assert pace.value == pytest.approx(second)


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({"terms.extra.far": {"loss": "rlk"}}, ["terms.extra.far.loss: no loss is called 'rlk'; did you mean"]),
        (
            {"terms.extra.far": {"loss": "rkl", "settings": {"temprature": 2}}},
            ["terms.extra.far.settings.temprature: no such setting; did you mean terms.extra.far.settings.temperature"],
        ),
        (
            {"terms.extra.far": {"loss": "seqkd", "text": {"source": "student"}}},
            ["terms.extra.far.text.source: the loss seqkd takes text by dataset, teacher, not by student"],
        ),
        ({"terms.extra.main": {"loss": "rkl"}}, ["terms: `extra` needs names of lower-case letters"]),
        ({"schedules.temprature": {"start": 1, "end": 2}}, ["schedules.temprature: kd has no numeric setting"]),
        ({"schedules.scale_by_t2": {"start": 0, "end": 1}}, ["schedules.scale_by_t2: kd has no numeric setting"]),
        ({"schedules.temperature": {"start": 0, "end": 2}}, ["schedules.temperature.start: should be greater"]),
        ({"schedules.temperature": {"end": 2}}, ["schedules.temperature.start: is missing"]),
    ],
)
def test_mistakes_have_their_sentences(changes, problems, settings_of):
    with pytest.raises(SettingsError) as caught:
        settings_of("kd", changes)
    assert len(caught.value.problems) == len(problems)
    for found, start in zip(caught.value.problems, problems, strict=True):
        assert found.startswith(start)


def test_the_settings_of_a_run_are_read_back(settings_of, quiet):
    folder = run.train(settings_of("kd", {"terms.extra.far": {**KL, "weight": 0.5}, "train.steps": 1}), console=quiet)
    text = folder.config.read_text()
    assert "far:" in text
    assert json.loads(folder.facts.read_text())["steps"] == 1


def test_a_loss_beside_the_main_one_whose_text_takes_the_teacher_needs_one(settings_of, toy):
    text = {"source": "pairs", "chosen": "dataset", "rejected": "student", "teacher_veto": 9}
    changes = {
        "student.model": str(toy / "gpt2"),
        "student.init": "pretrained",
        "student.layers": None,
        "terms.extra.far": {"loss": "dpkd-simpo", "text": text},
    }
    with pytest.raises(SettingsError, match=r"missing, but terms\.extra\.far\.text\.teacher_veto lets the teacher's"):
        settings_of("sft", changes, teacher=None)
