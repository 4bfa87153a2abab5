"""Old paths of settings: valid in every layer, with a warning that names the new one."""

from __future__ import annotations

import warnings

import pytest

from dpkd.config.aliases import SettingRenamed, renamed
from dpkd.config.layers import Layer, set_layer
from dpkd.errors import SettingsError


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
