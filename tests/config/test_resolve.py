"""From layers to the settings of a run: exact sentences for what is wrong, and what stands where all is right."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpkd.api import Card, Family, LossConfig, LossSpec, PairLoss, RolloutLoss, Signal, Source, Text, TokenLoss, setting
from dpkd.config.layers import Layer, file_layer, set_layer, user_layers
from dpkd.config.resolve import Resolved, resolve
from dpkd.config.write import annotated_yaml, read_sources, schema, write_config
from dpkd.data.settings import DataSettings
from dpkd.errors import SettingsError
from dpkd.plugins import RegisteredLoss, Registry, load_registry


class Inner(LossConfig):
    mu: float = setting(0.5, description="share", source="made up", ge=0, le=1)


class Config(LossConfig):
    beta: float = setting(0.2, description="scale", source="made up", gt=0, lt=1)
    inner: Inner = setting(Inner(), description="a block", source="made up")


CARD = Card("A fake", "Nothing.", "0", (Source("No paper", "https://example.org"),), "never", "always")
PAIR_READS = frozenset({Signal.STUDENT_LOGPS, Signal.TEACHER_LOGPS, Signal.LENGTHS})
TOKEN_READS = frozenset({Signal.STUDENT_LOGITS, Signal.TEACHER_LOGITS})
SPECS = [
    LossSpec("soft", TokenLoss, Config, CARD, TOKEN_READS),
    LossSpec(
        "hard",
        TokenLoss,
        LossConfig,
        CARD,
        frozenset({Signal.TARGETS}),
        accepts=frozenset({Text.DATASET, Text.TEACHER}),
    ),
    LossSpec(
        "moving", TokenLoss, Config, CARD, TOKEN_READS, suggests={"schedules": {"beta": {"start": 0.1, "end": 0.9}}}
    ),
    LossSpec("choice", PairLoss, Config, CARD, PAIR_READS, suggests={"train": {"lr": 1e-5}}),
    LossSpec(
        "policy",
        RolloutLoss,
        LossConfig,
        CARD,
        frozenset({Signal.TEACHER_LOGPS, Signal.ADVANTAGES}),
        accepts=frozenset({Text.STUDENT}),
        suggests={"text": {"source": "student", "teacher_mix": 0.2}},
    ),
]


def registry_of(*specs: LossSpec) -> Registry:
    registry = Registry(
        [point for point in entry_points(group="dpkd") if point.name.startswith(("sampler.", "source."))]
    )
    for spec in specs:
        registry.add(RegisteredLoss(spec, "fakes", "1.0", spec.name, "fakes.py"))
    return registry


REGISTRY = registry_of(*SPECS)


def base(loss: str, **more: Any) -> Layer:
    return Layer("base.yaml", {"loss": loss, "teacher": "big", "student": "small", **more})


def run(*layers: Layer, sets: tuple[str, ...] = ()) -> Resolved:
    return resolve([*layers, *set_layer(sets)], REGISTRY)


def problems(*layers: Layer, sets: tuple[str, ...] = ()) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        run(*layers, sets=sets)
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_suggestions_stand_between_defaults_and_the_user() -> None:
    assert run(base("soft")).settings.train.lr == 5e-4
    assert run(base("choice")).settings.train.lr == 1e-5
    assert run(base("choice")).provenance["train.lr"] == "choice's suggestions"
    mine = run(base("choice", train={"lr": 1e-3}))
    assert (mine.settings.train.lr, mine.provenance["train.lr"]) == (1e-3, "base.yaml")


def test_suggestions_are_those_of_the_loss_that_runs_in_the_end() -> None:
    resolved = run(base("choice"), Layer("--loss", {"loss": "soft"}))
    assert resolved.settings.train.lr == 5e-4
    assert "train.lr" not in resolved.provenance


def test_the_settings_of_the_loss_are_its_own() -> None:
    resolved = run(base("soft"), sets=("loss.beta=0.3", "loss.inner.mu=1"))
    assert isinstance(resolved.main.config, Config)
    assert (resolved.main.config.beta, resolved.main.config.inner.mu) == (0.3, 1.0)
    assert resolved.loss.name == "soft"
    assert resolved.plugin == "fakes 1.0"


WRONG = {
    "bound": (["loss.beta=1.5"], "loss.beta: should be less than 1 (got 1.5, from --set)"),
    "bound of a part": (["train.betas=[0.9, 1]"], "train.betas.1: should be less than 1 (got 1, from --set)"),
    "block of a loss": (["loss.inner.mu=2"], "loss.inner.mu: should be less than or equal to 1 (got 2, from --set)"),
    "type": (["train.steps=many"], "train.steps: should be a whole number (got 'many', from --set)"),
    "no such setting": (["train.epoch=1"], "train.epoch: no such setting (from --set); did you mean train.epochs?"),
    "misspelt block": (["trian.lr=1"], "trian: no such setting (from --set); did you mean train?"),
    "misspelt setting of the loss": (
        ["loss.bata=0.1"],
        "loss.bata: no such setting (from --set); did you mean loss.beta?",
    ),
    "not of this loss": (
        ["loss.temperture=2"],
        "loss.temperture: no such setting (from --set); this loss has beta, inner",
    ),
    "nothing like it in the block": (
        ["data.zzz=2"],
        f"data.zzz: no such setting (from --set); data has {', '.join(DataSettings.model_fields)}",
    ),
    "misspelt schedule that lacks its values": (
        ["schedules.bata.shape=linear"],
        "schedules.bata: soft has no numeric setting of that name (beta); did you mean schedules.beta? (from --set)",
    ),
    "schedule out of range": (
        ["schedules.beta={start: 0.5, end: 2}"],
        "schedules.beta.end: should be less than 1 (got 2.0, from --set)",
    ),
    "unknown loss beside it": (
        ["terms.extra.near.loss=sofd"],
        "terms.extra.near.loss: no loss is called 'sofd'; did you mean soft? (from --set)",
    ),
    "in the wrong place": (["beta=0.1"], "beta: no such setting (from --set); did you mean loss.beta?"),
    "choice": (
        ["train.schedule=cosin"],
        "train.schedule: should be one of 'cosine', 'linear', 'constant', 'constant_with_warmup', "
        "'cosine_with_restarts', 'cosine_with_min_lr', 'polynomial', 'inverse_sqrt', 'warmup_stable_decay' "
        "(got 'cosin', from --set)",
    ),
    "union": (["student.layers=x"], "student.layers: should be a whole number or a list (got 'x', from --set)"),
    "within a block": (
        ["train.min_lr=1", "train.lr=0.1"],
        "train: min_lr (1.0) must not be above lr (0.1) (from --set)",
    ),
    "block": (["train=5"], "train: should be a block of settings (got 5, from --set)"),
    "infinite": (["train.lr=.inf"], "train.lr: should be a finite number (got inf, from --set)"),
    "loss is a number": (
        ["loss=5"],
        "loss: no loss is named (got 5, from --set); choose one with --loss: choice, hard, moving, policy, soft",
    ),
    "unknown loss": (["loss=sofd"], "loss: no loss is called 'sofd'; did you mean soft? (from --set)"),
    "pair loss with a source": (
        ["loss=choice", "text.source=student"],
        "text.source: choice is a pair loss on two responses to each prompt, student gives single ones: choose one "
        "of pairs, preference (from --set)",
    ),
    "token loss with pairs": (
        ["text.source=pairs"],
        "text.source: soft is a token loss on single responses, pairs gives pairs: choose one of adaptive, dataset, "
        "each, mixed, student, teacher (from --set)",
    ),
    "text that the loss does not take": (
        ["loss=hard", "text.source=student"],
        "text.source: the loss hard takes text by dataset, teacher, not by student (from --set)",
    ),
    "veto of the teacher without the student's text": (
        ["text.teacher_veto=25"],
        "text.teacher_veto: the source dataset has no such setting (adaptive, each, mixed, pairs, student have it) "
        "(from --set)",
    ),
    "mix of the teacher where the student does not write": (
        ["loss=choice", "text.rejected=dataset", "text.teacher_mix=0.1"],
        "text: `teacher_mix` is used only where the student writes, and it does not here (from --set)",
    ),
    "source": (
        ["text.source=studnet"],
        "text.source: no response source is called 'studnet'; did you mean student? (from --set)",
    ),
    "veto and mix": (
        ["text.source=student", "text.teacher_veto=25", "text.teacher_mix=0.1"],
        "text: `teacher_mix` and `teacher_veto` exclude each other: leave one out (from --set)",
    ),
    "mix of the teacher without the student's text": (
        ["text.teacher_mix=0.1"],
        "text.teacher_mix: the source dataset has no such setting (adaptive, each, mixed, pairs, student have it) "
        "(from --set)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_mistake_has_its_sentence(case: str) -> None:
    sets, sentence = WRONG[case]
    assert problems(base("soft"), sets=tuple(sets)) == (sentence,)


def test_all_mistakes_of_all_layers_are_reported_at_once() -> None:
    found = problems(
        Layer("base.yaml", {"loss": "soft", "train": {"lr": -1, "stepz": 3}}),
        Layer("more.yaml", {"dta": "x"}),
        sets=("loss.beta=0", "student.dropout=maybe"),
    )
    assert found == (
        "student.dropout: should be one of 'keep', 'off' (got 'maybe', from --set)",
        "train.lr: should be greater than 0 (got -1, from base.yaml)",
        "train.stepz: no such setting (from base.yaml); did you mean train.steps?",
        "dta: no such setting (from more.yaml); did you mean data?",
        "loss.beta: should be greater than 0 (got 0, from --set)",
        "teacher.model: is missing, but the loss soft needs its logits. Name one with --teacher.",
    )


def test_what_cannot_be_read_is_reported_with_the_other_mistakes() -> None:
    unread: list[str] = []
    layers = user_layers([], {"--loss": ("loss.name", "soft")}, ["foo", "train.steps=-3", "student.model=s"], unread)
    with pytest.raises(SettingsError) as caught:
        resolve([*layers, Layer("--teacher", {"teacher": "t"})], REGISTRY, unread=unread)
    assert caught.value.problems == (
        "--set foo: expected path=value, such as --set train.lr=1e-4",
        "train.steps: should be greater than or equal to 1 (got -3, from --set)",
    )


def test_nothing_at_all_says_what_is_needed() -> None:
    assert problems() == (
        "loss: no loss is named; choose one with --loss: choice, hard, moving, policy, soft",
        "student.model: is missing. Name one with --student, or make it from the teacher: "
        "--set student.init=layers --set student.layers=12",
    )


def test_what_may_only_be_misspelt_is_not_missing() -> None:
    found = problems(Layer("base.yaml", {"loss": "soft", "teacher": {"modle": "big"}, "student": "small"}))
    assert found == ("teacher.modle: no such setting (from base.yaml); did you mean teacher.model?",)


@pytest.mark.parametrize(
    ("loss", "sets", "reason"),
    [
        ("soft", (), "the loss soft needs its logits"),
        (
            "choice",
            ("text.rejected=dataset",),
            "the loss choice needs its token log-probs; it writes responses (text.chosen)",
        ),
        ("hard", ("text.source=teacher",), "it writes responses (text.source)"),
        (
            "hard",
            ("text.source=mixed", "text.mix={teacher: 0.5, dataset: 0.5}"),
            "it writes responses (text.mix.teacher)",
        ),
        (
            "hard",
            ("terms.pretrain.weight=1", "terms.pretrain.kd_ratio=0.5", "terms.pretrain.corpus.path=c.txt"),
            "terms.pretrain.kd_ratio distils from it on plain text",
        ),
    ],
)
def test_why_a_teacher_is_needed(loss: str, sets: tuple[str, ...], reason: str) -> None:
    (found,) = problems(Layer("base.yaml", {"loss": loss, "student": "small"}), sets=sets)
    without = "; if its responses are in your data, --set text.source=dataset needs none"
    only_writes = reason.startswith("it writes")
    assert found == f"teacher.model: is missing, but {reason}. Name one with --teacher{without * only_writes}."


def test_a_student_made_of_layers_needs_the_teacher_and_no_model() -> None:
    sets = ("student.init=layers", "student.layers=2")
    assert run(Layer("a", {"loss": "hard", "teacher": "big"}), sets=sets).settings.student.model is None
    (found,) = problems(Layer("a", {"loss": "hard"}), sets=sets)
    assert found.startswith("teacher.model: is missing, but student.init=layers builds the student from it")
    (found,) = problems(base("hard"), sets=sets)
    assert found.startswith("student.model: small is not used with student.init=layers")


def test_supervised_training_needs_no_teacher() -> None:
    assert run(Layer("a", {"loss": "hard", "student": "small"})).settings.teacher.model is None


def test_the_default_text_is_named_as_such() -> None:
    registry = registry_of(REGISTRY.losses["policy"].spec)
    layers = [base("policy"), *set_layer(["text.source=dataset", "text.teacher_mix=0"])]
    with pytest.raises(SettingsError, match="takes text by student, not by dataset"):
        resolve(layers, registry)


@pytest.mark.parametrize("loss", [spec.name for spec in SPECS])
def test_a_resolved_file_resolves_to_the_same(loss: str, tmp_path: Path) -> None:
    resolved = run(base(loss, output="a: #b\n'c'"), sets=("train.trackers=[wandb]", "student.lora.r=4"))
    write_config(resolved, tmp_path)
    again = resolve([file_layer(tmp_path / "config.resolved.yaml")], REGISTRY)
    assert again.as_dict() == resolved.as_dict()
    assert (again.settings, again.main.config) == (resolved.settings, resolved.main.config)
    assert yaml.safe_load(annotated_yaml(resolved)) == resolved.as_dict(), "any YAML reader gives the same"


def test_installed_losses_resolve_with_their_suggestions(tmp_path: Path) -> None:
    registry = load_registry({})
    assert registry.losses
    for name in registry.losses:
        resolved = resolve([base(name)], registry)
        write_config(resolved, tmp_path)
        again = resolve([file_layer(tmp_path / "config.resolved.yaml")], registry)
        assert again.settings == resolved.settings, name


def test_values_that_are_no_default_say_where_they_came_from() -> None:
    lines = annotated_yaml(run(base("choice"), sets=("seed=3",))).splitlines()
    assert lines[:3] == ["# A value without a comment is a default.", "loss:", "  name: choice  # base.yaml"]
    assert "  lr: 1.0e-05  # choice's suggestions" in lines
    assert "seed: 3  # --set" in lines
    assert "  warmup_steps: 0" in lines


def test_a_rate_that_is_chosen_later_is_shown_as_such() -> None:
    text = annotated_yaml(run(base("soft")))
    said = "a default: a run chooses by size and adapters, see dpkd train --dry-run"
    assert f"  lr: 0.0005  # {said}" in text.splitlines()
    assert "train.lr" not in read_sources(text), "it comes from nobody"
    assert said not in annotated_yaml(run(base("soft"), sets=("train.lr=0.0005",)))


def test_a_resolved_file_leaves_out_what_the_run_does_not_use() -> None:
    drawn = {"source", "sampling", "teacher_sampling", "backend", "backend_settings", "decoding", "store"}
    assert run(base("soft")).as_dict()["text"].keys() == drawn
    assert run(base("choice"), sets=("text.source=preference",)).as_dict()["text"].keys() == drawn
    pair = run(base("choice"))
    assert pair.loss.family is Family.PAIR
    assert {"source", "chosen", "rejected"} < pair.as_dict()["text"].keys()
    assert not {"mix", "each", "share", "num_generations"} & pair.as_dict()["text"].keys()


def test_schema_holds_the_settings_of_the_loss() -> None:
    found = schema(REGISTRY, REGISTRY.losses["soft"])
    loss = next(option for option in found["properties"]["loss"]["anyOf"] if "properties" in option)
    assert loss["properties"]["beta"]["exclusiveMaximum"] == 1
    assert loss["properties"]["name"] == {"const": "soft", "type": "string"}
    assert {"type": "string"} in found["properties"]["teacher"]["anyOf"]
    references = {line for line in json.dumps(found).split('"') if line.startswith("#/$defs/")}
    assert references
    assert {line.removeprefix("#/$defs/") for line in references} <= found["$defs"].keys()


def test_none_is_a_word_where_a_setting_may_be_none() -> None:
    resolved = run(base("soft"), sets=("train.clip=none", "train.save_every=None", "data.template=none"))
    assert (resolved.settings.train.clip, resolved.settings.train.save_every) == (None, None)
    assert resolved.settings.data.template == "none", "a text of that name stays"
    (problem,) = problems(base("soft"), sets=("train.lr=none",))
    assert problem.startswith("train.lr: should be a number (got 'none'")


def test_layers_alone_are_those_of_the_teacher() -> None:
    resolved = run(Layer("a", {"loss": "soft", "teacher": "big"}), sets=("student.layers=3",))
    assert resolved.settings.student.init == "layers"


def test_a_suggested_teacher_mix_goes_when_the_user_says_who_writes() -> None:
    (problem,) = problems(base("policy"), sets=("text.source=dataset",))
    assert problem == "text.source: the loss policy takes text by student, not by dataset (from --set)"


def test_a_given_setting_does_not_follow_a_suggested_schedule() -> None:
    assert set(run(base("moving")).settings.schedules) == {"beta"}
    fixed = run(base("moving"), sets=("loss.beta=0.3",))
    assert fixed.settings.schedules == {}
    assert fixed.main.config.beta == 0.3  # type: ignore[attr-defined]
    own = run(base("moving"), sets=("loss.beta=0.3", "schedules.beta.end=0.5"))
    assert own.settings.schedules["beta"].end == 0.5, "a schedule that the user touches is the user's"
