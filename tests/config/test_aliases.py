"""Old paths of settings: valid in every layer, with a warning that names the new one."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from dpkd.config.aliases import SettingRenamed, renamed, written_layers
from dpkd.config.layers import Layer, set_layer
from dpkd.config.resolve import resolve
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
