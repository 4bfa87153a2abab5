"""Old paths of settings: valid in every layer, with a warning that names the new one."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from dpkd.config.aliases import FIELD, SettingRenamed, in_our_names, renamed, written_layers
from dpkd.config.layers import Layer, merge, set_layer
from dpkd.config.problems import all_paths
from dpkd.config.resolve import resolve
from dpkd.config.settings import RunSettings, TrainSettings
from dpkd.errors import SettingsError
from dpkd.plugins import load_registry
from dpkd.rollout.dataset import DatasetConfig
from dpkd.rollout.mixed import MixedConfig
from dpkd.rollout.pairs import PairsConfig


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"text": {"samples_per_prompt": 3}}, {"text": {"num_generations": 3}}),
        (
            {"text": {"pairs": {"preferred": "dataset", "dispreferred": "teacher"}}},
            {"text": {"source": "pairs", "chosen": "dataset", "rejected": "teacher"}},
        ),
        ({"text": {"source": "adaptive", "adaptive": {"share": 1}}}, {"text": {"source": "adaptive", "share": 1}}),
        (
            {"terms": {"extra": {"far": {"loss": "x", "text": {"inner_epochs": 2, "pairs": {"chosen": "dataset"}}}}}},
            {
                "terms": {
                    "extra": {
                        "far": {"loss": "x", "text": {"source": "pairs", "num_iterations": 2, "chosen": "dataset"}}
                    }
                }
            },
        ),
    ],
)
def test_an_old_path_is_the_new_one_and_warns(old, new) -> None:
    with pytest.warns(SettingRenamed, match=r"is now called .* \(from mine\.yaml\)"):
        assert renamed(Layer("mine.yaml", old)).values == new
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert renamed(Layer("mine.yaml", old), quiet=True).values == new
        assert renamed(Layer("mine.yaml", new)).values == new, "what is new stays as it is"


def test_both_names_are_a_mistake() -> None:
    layer = Layer("mine.yaml", {"text": {"inner_epochs": 2, "num_iterations": 3}})
    with pytest.raises(SettingsError, match=r"text\.inner_epochs: is the old name of text\.num_iterations, and both"):
        renamed(layer)


def test_it_goes_for_every_layer() -> None:
    (layer,) = set_layer(["text.pairs.preferred=dataset"])
    with pytest.warns(SettingRenamed, match=r"text\.pairs\.preferred is now called text\.chosen \(from --set\)"):
        assert renamed(layer).values == {"text": {"source": "pairs", "chosen": "dataset"}}


OLD = """
loss: {name: LOSS}
teacher: {model: big}
student: {model: small}
text:
SOURCE
  each: []
  adaptive: {share: 0.0, rise: 0.1, tolerance: 0.1, capacity: 1000, fresh: decreasing}
  sampling: {temperature: 1.0, top_p: 1.0, top_k: 0, max_new_tokens: 64, batch_size: 32}
  samples_per_prompt: 1
  teacher_mix: 0.0
  teacher_veto: 0
  refresh: once
  every: 1
  inner_epochs: 1
  backend: hf
  backend_settings: {}
  store: null
terms:
  extra:
    far:
      loss: dpo
      text:
        {source: dataset, mix: {}, each: [], pairs: {preferred: dataset, dispreferred: student}, refresh: once,
         adaptive: {share: 0.0, rise: 0.1, tolerance: 0.1, capacity: 1000, fresh: decreasing}, inner_epochs: 1}
"""


@pytest.mark.parametrize(
    ("loss", "source", "expected"),
    [
        ("kd", "  source: dataset\n  mix: {}", DatasetConfig),
        ("gkd", "  source: mixed\n  mix: {dataset: 0.5, student: 0.5}", MixedConfig),
        ("dpkd", "  pairs: {preferred: teacher, dispreferred: dataset}", PairsConfig),
    ],
)
def test_a_run_of_an_older_version_can_go_on(loss, source, expected, tmp_path: Path) -> None:
    """Its settings have those of every source; those that its own does not have said nothing."""
    path = tmp_path / "config.resolved.yaml"
    path.write_text(OLD.replace("LOSS", loss).replace("SOURCE", source), encoding="utf-8")
    registry = load_registry({})
    resolved = resolve(written_layers(path, registry), registry)
    text = resolved.settings.text
    assert isinstance(text, expected)
    assert text.sampling.max_new_tokens == 64
    if expected is PairsConfig:
        assert (text.chosen, text.rejected, text.refresh) == ("teacher", "dataset", "once")
    far = resolved.extras[0].text
    assert isinstance(far, PairsConfig)
    assert (far.chosen, far.rejected, far.refresh) == ("dataset", "student", "once")


def _in_our_names(*assignments: str, processes: int = 1) -> dict[str, object]:
    return merge(in_our_names(set_layer(assignments), processes)).values


@pytest.mark.parametrize("block", ["", "train."])
def test_the_fields_names_are_valid_without_a_warning(block) -> None:
    names = {"learning_rate": 1e-4, "num_train_epochs": 3, "max_steps": -1, "max_grad_norm": 0.5, "report_to": "wandb"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = _in_our_names(
            *(f"{block}{name}={value}" for name, value in names.items()), f"{block}optim=adamw_torch_fused"
        )
    train = {"lr": 1e-4, "epochs": 3, "clip": 0.5, "trackers": ["wandb"], "optimizer": "adamw"}
    assert found == {"train": train}


@pytest.mark.parametrize(
    ("given", "processes", "size", "forward"),
    [
        (["per_device_train_batch_size=4", "gradient_accumulation_steps=8"], 1, 32, 4),
        (["per_device_train_batch_size=4", "train.gradient_accumulation_steps=8"], 2, 64, 4),
        (["per_device_train_batch_size=4"], 3, 12, 4),
        (
            ["gradient_accumulation_steps=5"],
            1,
            40,
            8,
        ),  # eight sequences per forward are dpkd's default, and the field's
    ],
)
def test_accumulation_means_what_it_means_elsewhere(given, processes, size, forward) -> None:
    train = _in_our_names(*given, processes=processes)["train"]
    assert TrainSettings.model_validate(train).batch_size == size
    assert TrainSettings.model_validate(train).micro_batch_size == forward


def test_processes_are_those_that_were_started(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert merge(in_our_names(set_layer(["gradient_accumulation_steps=2"]))).values == {"train": {"batch_size": 64}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["learning_rate=1e-4", "train.lr=1e-4"], None),  # two --set: the later wins, as everywhere
        (
            ["gradient_accumulation_steps=2", "train.batch_size=8"],
            r"train\.batch_size: is what gradient_accumulation_steps make, and both are given \(from --set\)",
        ),
        (["per_device_train_batch_size=0"], r"per_device_train_batch_size: should be a whole number from 1 \(got 0"),
    ],
)
def test_contradictions_are_mistakes(given, message) -> None:
    if message is None:
        assert _in_our_names(*given) == {"train": {"lr": 1e-4}}
        return
    with pytest.raises(SettingsError, match=message):
        _in_our_names(*given)


def test_both_names_in_one_file_are_a_mistake() -> None:
    layer = Layer("mine.yaml", {"learning_rate": 1e-4, "train": {"lr": 1e-3}})
    with pytest.raises(SettingsError, match=r"learning_rate: is the same as train\.lr, and both are given"):
        in_our_names([layer])


@pytest.mark.parametrize(
    ("assignment", "path"),
    [
        ("batch.size=4", "train.batch_size"),
        ("batch_size=4", "train.batch_size"),
        ("bf16=true", "train.precision"),
        ("train.gradient_acumulation=4", None),
    ],
)
def test_the_setting_that_is_meant_is_suggested(assignment, path) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve(set_layer(["loss.name=sft", "student.model=x", assignment]), load_registry())
    (problem,) = caught.value.problems
    assert path is None or problem.endswith(f"did you mean {path}?")


def test_every_name_of_the_field_is_a_setting() -> None:
    known = {*all_paths(RunSettings), *all_paths(MixedConfig, "text.")}
    assert set(FIELD.values()) <= known
