"""What every built-in loss keeps: found by its entry point, described, closed, finite, row by row."""

from __future__ import annotations

import ast
import importlib
import math
import re
from contextlib import nullcontext
from dataclasses import fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import dpkd_zoo
import pytest
import torch
from no_waits import NoWaits
from pydantic import ValidationError
from zoo_inputs import inputs_of, randn, row_of

from dpkd import functional
from dpkd.api import HIDDEN, Card, Family, LossConfig, LossSpec, Text, Trait
from dpkd.config.extras import own_text
from dpkd.config.settings import RunSettings
from dpkd.plugins import load_registry

NAMES = {
    "sft",
    "kd",
    "seqkd",
    "rkl",
    "akl",
    "minillm",
    "dpkd",
    "dpkd-greedy",
    "dpkd-token",
    "dpkd-ipo",
    "dpkd-cpo",
    "dpkd-simpo",
    "fkl",
    "jsd",
    "gkd",
    "skl",
    "srkl",
    "tvd",
    "symmetric-kl",
    "hellinger",
    "alpha-beta",
    "topk-kl",
    "topk-rkl",
    "topk-rkl-sampled",
    "topk-jsd",
    "sampled-kl",
    "todi",
    "dkd",
    "taid",
    "distillm",
    "imitkd",
    "logits-mse",
    "bild",
    "uld",
    "gold",
    "dpkd-dpop",
    "dpkd-orpo",
    "dpkd-hinge",
    "dpkd-robust",
    "dpkd-exo",
    "dpkd-apo",
    "plad",
    "opd",
    "dpo",
    "dadpo",
    "hidden-mse",
    "hidden-cosine",
    "distillm2",
    "speculative-kd",
}
POINTS = [p for p in entry_points(group="dpkd") if p.value.startswith("dpkd_zoo.")]
SPECS: list[LossSpec] = [spec for point in POINTS for spec in point.load().dpkd_losses()]
OWN = [spec for spec in SPECS if not spec.preset_of]
# Losses on hidden states have inputs of another kind: they have the kit, and tests of their own.
ON_NUMBERS = [spec for spec in SPECS if not HIDDEN & spec.signals()]
SHARED = ("__init__", "papers", "pairs", "hidden")
FILES = sorted(p for p in Path(dpkd_zoo.__file__).parent.glob("*.py") if p.stem not in SHARED)

# Settings under which a loss takes another path.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "kd": [{"kd_ratio": 1.0}, {"temperature": 2.0}],
    "seqkd": [{"kd_ratio": 0.5}],
    "rkl": [{"temperature": 2.0}],
    "akl": [{"boundary": "released"}],
    "minillm": [{"clip_epsilon": None}, {"single_step_weight": 0.0}, {"weigh_single_step": False}],
    "dpkd": [{"aggregation": "sum"}, {"label_smoothing": 0.1}],
    "dpkd-token": [{"form": "ipo"}, {"form": "dpop"}, {"reference_free": True}],
    "dpkd-ipo": [{"aggregation": "mean"}],
    "dpkd-cpo": [{"aggregation": "mean", "nll_aggregation": "mean"}],
    "fkl": [{"temperature": 2.0, "scale_by_t2": True}],
    "jsd": [{"beta": 0.0}, {"beta": 1.0}, {"beta": 0.2, "rescale": True}, {"temperature": 2.0}],
    "gkd": [{"beta": 0.0}, {"beta": 1.0}],
    "skl": [{"skew": 0.0}],
    "srkl": [{"skew": 0.0}],
    "tvd": [{"temperature": 2.0}],
    "symmetric-kl": [{"reverse_weight": 0.0}, {"reverse_weight": 1.0}],
    "hellinger": [{"temperature": 2.0}],
    "alpha-beta": [{"alpha": 0.0}, {"beta": 0.0}, {"alpha": 0.0, "beta": 0.0}, {"alpha": 1.0, "beta": 1.0}],
    "topk-kl": [{"k": 3}, {"k": 3, "tail": "renormalise"}],
    "topk-rkl": [{"k": 3}],
    "topk-rkl-sampled": [{"k": 2}],
    "topk-jsd": [{"k": 3, "beta": 0.2}],
    "sampled-kl": [{"power": 0.5}, {"samples": 3, "seed": 1}],
    "todi": [{"beta": 0.0}],
    "dkd": [{"alpha": 0.0}, {"target": "teacher"}],
    "taid": [{"t": 1.0}],
    "distillm": [{"divergence": "srkl"}],
    "speculative-kd": [{"beta": 0.5}, {"beta": 1.0}],
    "distillm2": [{"skew_teacher": 0.0, "skew_student": 0.0, "beta": 0.75}],
    "imitkd": [{"target": "distribution"}],
    "bild": [{"k": 4, "temperature": 1.0}],
    "uld": [{"ce_weight": 0.0}, {"temperature": 2.0}],
    "gold": [{"hybrid": False}, {"matched_weight": 0.5}],
    "dpkd-dpop": [{"aggregation": "sum"}, {"dpop_weight": 0.0}],
    "dpkd-hinge": [{"aggregation": "mean"}, {"reference": "none"}],
    "dpkd-robust": [{"aggregation": "sum"}, {"flipped": 0.0}],
    "dpkd-exo": [{"aggregation": "mean"}],
    "dpkd-apo": [{"form": "down"}, {"aggregation": "mean"}],
    "plad": [{"form": "margin"}],
    "opd": [
        {"discount": 1.0},
        {"clip_epsilon": 0.2},
        {"importance": False},
        {"estimator": "k2"},
        {"estimator": "k3", "importance": False},
    ],
    "dpo": [{"aggregation": "mean"}, {"label_smoothing": 0.1}],
    "dadpo": [{"aggregation": "mean"}],
}
CASES = [
    pytest.param(spec, settings, id=f"{spec.name}-{'-'.join(f'{k}={v}' for k, v in settings.items()) or 'default'}")
    for spec in ON_NUMBERS
    for settings in [{}, *VARIANTS.get(spec.name, [])]
]
SORTING = {"uld", "gold"}  # they look how many tokens have mass: without it they would sort all of two vocabularies
OUTSIDE: dict[str, list[dict[str, Any]]] = {
    "kd": [{"kd_ratio": 0.0}, {"kd_ratio": 1.1}, {"temperature": 0.0}, {"scale_by_t2": "perhaps"}],
    "rkl": [{"temperature": 0.0}, {"temperature": -1.0}],
    "akl": [{"mu": 0.0}, {"mu": 1.0}, {"boundary": "code"}],
    "minillm": [
        {"discount": 0.0},
        {"discount": 1.1},
        {"reward_scale": 0.0},
        {"reward_clip": 0.0},
        {"clip_epsilon": 0.0},
        {"clip_epsilon": 1.0},
        {"single_step_weight": -1.0},
        {"whiten": "batch"},
    ],
    "dpkd": [{"beta": 0.0}, {"aggregation": "total"}, {"label_smoothing": -0.1}, {"label_smoothing": 0.5}],
    "dpkd-token": [
        {"beta": 0.0},
        {"form": "cpo"},
        {"dpop_weight": -1.0},
        {"label_smoothing": -0.1},
        {"label_smoothing": 0.5},
    ],
    "dpkd-ipo": [{"tau": 0.0}, {"aggregation": "total"}],
    "dpkd-cpo": [{"beta": 0.0}, {"aggregation": "total"}, {"nll_weight": -1.0}, {"nll_aggregation": "total"}],
    "dpkd-simpo": [{"beta": 0.0}, {"gamma": -0.1}],
    "fkl": [{"temperature": 0.0}],
    "jsd": [{"beta": -0.1}, {"beta": 1.1}, {"temperature": 0.0}],
    "skl": [{"skew": -0.1}, {"skew": 1.0}],
    "srkl": [{"skew": -0.1}, {"skew": 1.0}],
    "tvd": [{"temperature": 0.0}],
    "symmetric-kl": [{"reverse_weight": -0.1}, {"reverse_weight": 1.1}, {"temperature": 0.0}],
    "hellinger": [{"temperature": 0.0}],
    "alpha-beta": [{"alpha": -2.1}, {"alpha": 2.1}, {"beta": -2.1}, {"beta": 2.1}],
    "topk-kl": [{"k": 0}, {"tail": "drop"}],
    "topk-rkl": [{"k": 0}],
    "topk-rkl-sampled": [{"k": 0}],
    "topk-jsd": [{"k": 0}, {"beta": 0.0}, {"beta": 1.0}],
    "sampled-kl": [{"samples": 0}, {"power": 0.0}, {"power": 2.1}, {"seed": -1}],
    "todi": [{"beta": -0.1}],
    "dkd": [{"alpha": -0.1}, {"beta": 0.0}, {"target": "student"}, {"temperature": 0.0}],
    "taid": [{"t": -0.1}, {"t": 1.1}],
    "distillm": [{"divergence": "kl"}, {"skew": 1.0}],
    "imitkd": [{"target": "text"}],
    "bild": [{"k": 2}, {"k": 129}, {"temperature": 0.0}],
    "uld": [{"uld_weight": 0.0}, {"ce_weight": -0.1}, {"temperature": 0.0}],
    "gold": [{"beta": 0.0}, {"beta": 1.0}, {"matched_weight": 0.0}, {"matched_weight": 1.1}],
    "dpkd-dpop": [{"beta": 0.0}, {"dpop_weight": -1.0}, {"aggregation": "total"}],
    "dpkd-orpo": [{"odds_weight": 0.0}],
    "dpkd-hinge": [{"beta": 0.0}, {"reference": "start"}, {"aggregation": "total"}],
    "dpkd-robust": [{"beta": 0.0}, {"flipped": -0.1}, {"flipped": 0.5}, {"aggregation": "total"}],
    "dpkd-exo": [{"beta": 0.0}, {"label_smoothing": 0.0}, {"label_smoothing": 0.5}, {"aggregation": "total"}],
    "dpkd-apo": [{"beta": 0.0}, {"form": "up"}, {"aggregation": "total"}],
    "plad": [{"form": "hinge"}, {"margin": 0.0}],
    "opd": [
        {"estimator": "k4"},
        {"discount": -0.1},
        {"discount": 1.1},
        {"reward_clip": 0.0},
        {"clip_epsilon": 0.0},
        {"clip_epsilon": 1.0},
    ],
    "dpo": [{"beta": 0.0}, {"aggregation": "total"}, {"label_smoothing": -0.1}, {"label_smoothing": 0.5}],
    "dadpo": [{"beta_start": 0.0}, {"beta_teacher": 0.0}, {"aggregation": "total"}],
    "distillm2": [{"skew_teacher": 1.0}, {"skew_student": -0.1}, {"beta": 0.0}, {"beta": 1.0}],
    "hidden-mse": [{"layers": "first"}, {"pairs": 1}, {"projection": "linear"}],
    "hidden-cosine": [{"layers": "first"}, {"pairs": 1}, {"projection": "linear"}],
}
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
each_on_numbers = pytest.mark.parametrize("spec", ON_NUMBERS, ids=lambda s: s.name)
LOGITS = [case for case in CASES if case.values[0].family is not Family.PAIR]
each_case = pytest.mark.parametrize(("spec", "settings"), CASES)
each_logits_case = pytest.mark.parametrize(("spec", "settings"), LOGITS)


def _logits(spec: LossSpec, count: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    """Float32 logits `[N, 7]`, or for pairs log-probs `[N, 2]`."""
    if spec.family is Family.PAIR:
        return -randn(count, 2, seed=seed, scale=scale, dtype=torch.float32).abs()
    return randn(count, 7, seed=seed, scale=scale, dtype=torch.float32)


def _run(spec: LossSpec, settings: dict[str, Any], student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    config = spec.config(**settings)
    return spec.loss(config)(inputs_of(spec, config, student, teacher))  # type: ignore[no-any-return]


def test_exactly_these_one_file_and_one_entry_point_each() -> None:
    assert len(SPECS) == len(NAMES) >= 29
    assert {spec.name for spec in SPECS} == NAMES
    assert {point.name for point in POINTS} == NAMES
    assert {path.stem.replace("_", "-") for path in FILES} == NAMES
    assert all(f"dpkd_zoo.{point.name.replace('-', '_')}" == point.value for point in POINTS)


def test_variants_name_losses_that_exist() -> None:
    assert set(VARIANTS) <= NAMES
    assert len(CASES) > len(LOGITS) > len(SPECS) > len(ON_NUMBERS) > 30


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_loss_imports_what_a_strangers_could(path: Path) -> None:
    """The standard library, NumPy, torch, pydantic, the public modules, the papers, and losses it is a preset of."""
    allowed = {"__future__", "math", "typing", "warnings", "torch", "pydantic", "dpkd.api", "dpkd.functional"}
    allowed |= {"numpy", "dpkd_zoo", "dpkd_zoo.papers"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert modules - allowed == set()


RESERVATION = re.compile(
    r"(not|n't|un) ?(be )?(confirmed|verified|checked)|from memory|folklore|second hand|summaries", re.IGNORECASE
)


def _reservations(spec: LossSpec) -> list[str]:
    """What a card and its settings say about their own sources that a reader would have to check."""
    fields = spec.config.model_json_schema()["properties"] if spec.config.model_fields else {}
    texts = [spec.card.notes, *(s.where for s in spec.card.sources), *(f["source"] for f in fields.values())]
    return [text for text in texts if RESERVATION.search(text)]


@each_spec
def test_only_contrib_has_reservations(spec: LossSpec) -> None:
    """Outside `contrib`, formula and defaults are those of a paper or of code that the card names."""
    assert spec.card.unconfirmed or not _reservations(spec)


def test_reservations_are_found() -> None:
    """The search above is not blind: it finds what the cards of `contrib` say."""
    contrib = [spec for spec in SPECS if spec.card.unconfirmed]
    assert contrib
    assert all(map(_reservations, contrib))


@each_spec
def test_card_is_complete(spec: LossSpec) -> None:
    optional = {"unconfirmed"} | ({"notes"} if spec.name == "sft" else set())
    for field in fields(Card):
        if field.name not in optional:
            assert getattr(spec.card, field.name), f"{spec.name}: the card has no {field.name}"
    for source in spec.card.sources:
        assert source.title
        assert source.where
        assert source.url.startswith("https://")
    module = importlib.import_module(spec.loss.__module__)
    assert module.__doc__
    assert spec.loss.__doc__
    assert "\n" not in spec.card.summary


def test_presets_are_their_base_with_other_defaults() -> None:
    by_name = {spec.name: spec for spec in SPECS}
    presets = [spec for spec in SPECS if spec.preset_of]
    assert {spec.name for spec in presets} == {"dpkd-greedy", "gkd", "seqkd", "speculative-kd"}
    for spec in presets:
        base = by_name[spec.preset_of]
        assert (spec.loss, spec.family) == (base.loss, base.family)
        assert issubclass(spec.config, base.config)
        assert (spec.card, dict(spec.suggests)) != (base.card, dict(base.suggests))


@each_spec
def test_every_setting_is_described_and_has_a_source(spec: LossSpec) -> None:
    assert spec.config.__doc__
    for name, field in spec.config.model_fields.items():
        assert field.description, f"{spec.name}.{name}"
        assert isinstance(field.json_schema_extra, dict)
        assert field.json_schema_extra["source"], f"{spec.name}.{name}"
        assert not field.is_required()


@each_spec
def test_config_is_closed_frozen_and_goes_through_json(spec: LossSpec) -> None:
    config = spec.config()
    assert issubclass(spec.config, LossConfig)
    assert spec.config.model_validate_json(config.model_dump_json()) == config
    for typo in ("betaa", "temprature"):
        with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
            spec.config(**{typo: 1})
    for name in spec.config.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(config, name, getattr(config, name))
        if isinstance(getattr(config, name), float):
            with pytest.raises(ValidationError):
                spec.config(**{name: math.nan})


@each_case
def test_other_settings_go_through_json_too(spec: LossSpec, settings: dict[str, Any]) -> None:
    config = spec.config(**settings)
    assert spec.config.model_validate_json(config.model_dump_json()) == config
    assert (config == spec.config()) == (not settings)


@pytest.mark.parametrize(
    ("spec", "settings"),
    [pytest.param(s, o, id=f"{s.name}-{next(iter(o.items()))}") for s in SPECS for o in OUTSIDE.get(s.name, [])],
)
def test_a_value_outside_its_bounds_is_refused(spec: LossSpec, settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        spec.config(**settings)
    assert [error["loc"] for error in caught.value.errors()] == [tuple(settings)]
    assert caught.value.errors()[0]["type"] != "extra_forbidden"


def test_every_setting_has_a_value_that_is_refused() -> None:
    names = {(spec.name, name) for spec in OWN for name in spec.config.model_fields}
    switches = {(s.name, n) for s in OWN for n, f in s.config.model_fields.items() if f.annotation is bool}
    tried = {(loss, name) for loss, many in OUTSIDE.items() for settings in many for name in settings}
    assert tried <= names
    assert names - switches <= tried


@each_spec
def test_suggestions_are_settings_of_a_run(spec: LossSpec) -> None:
    RunSettings.model_validate({name: block for name, block in spec.suggests.items() if name != "text"})
    _, text = own_text(spec, {}, "text", load_registry())
    assert set(text.writers) <= spec.accepts


@each_spec
def test_pairs_take_any_writer_and_suggest_teacher_over_student(spec: LossSpec) -> None:
    if spec.family is Family.PAIR:
        assert spec.accepts == frozenset(Text)
        assert spec.suggests["text"].items() >= {"source": "pairs", "chosen": "teacher", "rejected": "student"}.items()


@each_case
def test_one_float32_value_per_row_and_rows_are_independent(spec: LossSpec, settings: dict[str, Any]) -> None:
    student, teacher = _logits(spec, 6, 1), _logits(spec, 6, 2)
    config = spec.config(**settings)
    loss = spec.loss(config)
    values = loss(inputs_of(spec, config, student, teacher))
    assert values.shape == (6,)
    assert values.dtype is torch.float32
    assert values.isfinite().all()
    x = inputs_of(spec, config, student, teacher)
    torch.testing.assert_close(torch.cat([loss(row_of(x, i)) for i in range(6)]), values)


@each_case
def test_no_rows_give_no_values_and_backward_works(spec: LossSpec, settings: dict[str, Any]) -> None:
    student = _logits(spec, 0, 1).requires_grad_()
    values = _run(spec, settings, student, _logits(spec, 0, 2))
    assert values.shape == (0,)
    values.sum().backward()
    assert student.grad is not None
    assert student.grad.shape == student.shape


@each_case
def test_no_value_is_read_where_the_host_would_wait(
    spec: LossSpec, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "free_to_read", lambda device: False)
    student, teacher = _logits(spec, 4, 1).requires_grad_(), _logits(spec, 4, 2)
    expected = pytest.raises(AssertionError, match="the host waits") if spec.name in SORTING else nullcontext()
    with expected, NoWaits():
        _run(spec, settings, student, teacher).sum().backward()


@each_case
def test_gradient_reaches_the_student_only_and_inputs_stay(spec: LossSpec, settings: dict[str, Any]) -> None:
    student, teacher = _logits(spec, 4, 1), _logits(spec, 4, 2)
    before = student.clone(), teacher.clone()
    student.requires_grad_()
    _run(spec, settings, student, teacher).sum().backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert torch.equal(student.detach(), before[0])
    assert torch.equal(teacher, before[1])


@each_logits_case
def test_bfloat16_logits_are_worked_on_in_float32(spec: LossSpec, settings: dict[str, Any]) -> None:
    """The same bfloat16 numbers as float32 give the same value."""
    student, teacher = _logits(spec, 5, 3).bfloat16(), _logits(spec, 5, 4).bfloat16()
    values = _run(spec, settings, student, teacher)
    assert values.dtype is torch.float32
    torch.testing.assert_close(values, _run(spec, settings, student.float(), teacher.float()))


@each_case
@pytest.mark.parametrize("scale", [1e-4, 50.0, 1e4])
def test_extreme_logits_give_finite_values_and_gradients(
    spec: LossSpec, settings: dict[str, Any], scale: float
) -> None:
    student = _logits(spec, 5, 5, scale).requires_grad_()
    values = _run(spec, settings, student, _logits(spec, 5, 6, scale))
    values.sum().backward()
    assert values.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@each_logits_case
def test_tokens_that_both_models_exclude_change_nothing(spec: LossSpec, settings: dict[str, Any]) -> None:
    student, teacher = _logits(spec, 5, 7), _logits(spec, 5, 8)
    out = torch.full((5, 2), -math.inf)
    plain = _run(spec, settings, student, teacher)
    wide = torch.cat([student, out], 1).requires_grad_()
    values = _run(spec, settings, wide, torch.cat([teacher, out], 1))
    torch.testing.assert_close(values, plain)
    values.sum().backward()
    assert wide.grad is not None
    assert wide.grad.isfinite().all()
    assert wide.grad[:, -2:].abs().max() == 0


@each_case
def test_traits_hold(spec: LossSpec, settings: dict[str, Any]) -> None:
    for seed in range(10):
        student, teacher = _logits(spec, 4, seed), _logits(spec, 4, seed + 100)
        if Trait.NON_NEGATIVE in spec.traits:
            assert _run(spec, settings, student, teacher).min() >= -1e-6
        if Trait.SHIFT_INVARIANT in spec.traits:
            torch.testing.assert_close(
                _run(spec, settings, student + 3, teacher - 5),
                _run(spec, settings, student, teacher),
                atol=1e-4,
                rtol=1e-4,
            )
        at_match = teacher.clone().requires_grad_()
        values = _run(spec, settings, at_match, teacher)
        values.sum().backward()
        assert at_match.grad is not None
        if Trait.ZERO_AT_MATCH in spec.traits:
            assert values.abs().max() < 1e-6
        if spec.traits & {Trait.ZERO_AT_MATCH, Trait.STATIONARY_AT_MATCH}:
            assert at_match.grad.abs().max() < 1e-6


@each_on_numbers
def test_traits_are_not_left_unsaid(spec: LossSpec) -> None:
    """A loss that is zero at match and does not say so is not checked for it."""
    teacher = _logits(spec, 8, 1)
    at_match = teacher.clone().requires_grad_()
    values = _run(spec, {}, at_match, teacher)
    values.sum().backward()
    assert at_match.grad is not None
    if max(values.abs().max().item(), at_match.grad.abs().max().item()) < 1e-6 and spec.family is Family.TOKEN:
        assert Trait.ZERO_AT_MATCH in spec.traits
    assert (Trait.SCORE_FUNCTION in spec.traits) == (spec.family is Family.ROLLOUT)
    assert (Trait.SHIFT_INVARIANT in spec.traits) == (spec.family is not Family.PAIR)


def test_these_are_the_only_score_functions() -> None:
    assert {s.name for s in SPECS if Trait.SCORE_FUNCTION in s.traits} == {"minillm", "opd"}
