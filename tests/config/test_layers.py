"""Reading layers, laying them over each other, and where each value came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dpkd.config.layers import Layer, file_layer, flag_layer, merge, set_layer, user_layers
from dpkd.config.yaml_text import YamlError, dump_value, parse
from dpkd.errors import SettingsError


def test_later_layers_win_value_by_value_and_each_is_remembered() -> None:
    merged = merge(
        [
            Layer("base.yaml", {"train": {"lr": 1.0, "steps": 5}, "seed": 1}),
            Layer("mine.yaml", {"train": {"lr": 2.0}}),
            flag_layer("--seed", "seed", 3),
        ]
    )
    assert merged.values == {"train": {"lr": 2.0, "steps": 5}, "seed": 3}
    assert merged.provenance == {"train.lr": "mine.yaml", "train.steps": "base.yaml", "seed": "--seed"}
    assert merged.layer_of("train") == "base.yaml and mine.yaml"
    assert merged.layer_of("train.eps") is None
    assert merged.layer_of("train.lr.deeper") == "mine.yaml"


def test_another_name_replaces_the_block() -> None:
    base = Layer("base.yaml", {"loss": {"name": "kd", "kd_ratio": 0.3}})
    assert merge([base, Layer("--loss", {"loss": "rkl"})]).values == {"loss": {"name": "rkl"}}
    assert merge([base, Layer("--loss", {"loss": "rkl"})]).provenance == {"loss.name": "--loss"}
    same = merge([base, Layer("--loss", {"loss": "kd"})])
    assert same.values == {"loss": {"name": "kd", "kd_ratio": 0.3}}


def test_settings_of_a_loss_may_come_before_its_name() -> None:
    merged = merge([Layer("base.yaml", {"loss": {"kd_ratio": 0.3}}), Layer("--loss", {"loss": "kd"})])
    assert merged.values == {"loss": {"name": "kd", "kd_ratio": 0.3}}


def test_text_in_place_of_a_block_is_shorthand() -> None:
    values = {"loss": "kd", "teacher": "big", "student": "small", "data": "rows.jsonl", "output": "runs/x"}
    assert merge([Layer("base.yaml", values)]).values == {
        "loss": {"name": "kd"},
        "teacher": {"model": "big"},
        "student": {"model": "small"},
        "data": {"path": "rows.jsonl"},
        "output": "runs/x",
    }


def test_a_value_takes_the_place_of_a_block_and_the_other_way_round() -> None:
    block = Layer("a", {"student": {"lora": {"r": 4}}})
    nothing = Layer("b", {"student": {"lora": None}})
    off, on = merge([block, nothing]), merge([nothing, block])
    assert (off.values, off.provenance) == ({"student": {"lora": None}}, {"student.lora": "b"})
    assert (on.values, on.provenance) == ({"student": {"lora": {"r": 4}}}, {"student.lora.r": "a"})


def test_a_block_with_nothing_under_it_says_nothing() -> None:
    merged = merge([Layer("a", {"train": {"lr": 1.0}}), Layer("b", {"train": None})])
    assert merged.values == {"train": {"lr": 1.0}}


SUGGESTED = Layer("gkd's suggestions", {"text": {"source": "mixed", "mix": {"dataset": 0.5, "student": 0.5}}})


def test_a_mix_is_one_value() -> None:
    mix = merge([SUGGESTED, Layer("--set", {"text": {"mix": {"teacher": 1.0}}})])
    assert mix.values["text"]["mix"] == {"teacher": 1.0}
    parts = merge([SUGGESTED, *set_layer(["text.mix.teacher=0.4", "text.mix.student=0.6"])])
    assert parts.values["text"]["mix"] == {"teacher": 0.4, "student": 0.6}


def test_a_setting_that_lost_its_meaning_goes_with_its_layer() -> None:
    below = Layer("base.yaml", {"text": {"refresh": "every_n_steps", "every": 4}})
    merged = merge([below, Layer("--set", {"text": {"refresh": "once"}})])
    assert merged.values == {"text": {"refresh": "once"}}
    assert merged.provenance == {"text.refresh": "--set"}
    kept = merge([below, *set_layer(["text.every=2", "text.refresh=once"])])
    assert kept.values["text"]["every"] == 2, "a contradiction of one layer stays, to be reported"


def test_set_takes_yaml_and_keeps_the_order() -> None:
    layers = set_layer(["train.lr=1e-4", "student.lora={r: 4}", "train.trackers=[wandb]", "output=", "train.lr=2"])
    merged = merge(layers)
    assert merged.values == {"train": {"lr": 2, "trackers": ["wandb"]}, "student": {"lora": {"r": 4}}, "output": None}
    assert set(merged.provenance.values()) == {"--set"}


def test_a_file_that_is_an_argument_is_named_alone(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        file_layer(tmp_path / "no.yaml", flag="")
    assert caught.value.problems == (f"{tmp_path / 'no.yaml'}: there is no such file",)


def test_everything_that_cannot_be_read_is_reported_at_once(tmp_path: Path) -> None:
    broken, absent = tmp_path / "broken.yaml", tmp_path / "absent.yaml"
    broken.write_text("train:\n  lr: [1\n")
    with pytest.raises(SettingsError) as caught:
        user_layers([broken, absent], {"--seed": ("seed", None)}, ["train.lr", "a..b=1", "train.lr=[1"])
    assert caught.value.problems == (
        f"{broken}:3: expected ',' or ']', but got '<stream end>'",
        f"--config {absent}: there is no such file; {tmp_path} has broken.yaml",
        "--set train.lr: expected path=value, such as --set train.lr=1e-4",
        "--set a..b=1: expected path=value, such as --set train.lr=1e-4",
        "--set train.lr=[1: the value is not YAML; quote it, as in --set 'train.lr=\"...\"'",
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train: {lr: 1}\ntrain: {lr: 2}", ":2: duplicate key 'train'"),
        ("train:\n  lr: 1\n  lr: 2", ":3: duplicate key 'lr'"),
        ("text:\n  mix:\n    1: 2", ":3: the key 1 is not text"),
        ("- kd", ": expected blocks of settings"),
        ("just text", ": expected blocks of settings"),
        ("a: !!python/object:os.system x", ":1: could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_settings(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        file_layer(path)
    assert caught.value.problems[0].startswith(f"{path}{problem}")


def test_an_empty_file_is_an_empty_layer(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing yet\n")
    assert file_layer(tmp_path / "c.yaml").values == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-3", -3),
        ("007", 7),
        ("1_000", "1_000"),
        ("off", "off"),
        ("no", "no"),
        ("yes", "yes"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        (".inf", float("inf")),
        ("-.inf", float("-inf")),
        ("'5'", "5"),
        ("0x10", "0x10"),
    ],
)
def test_plain_values_hold_no_surprises(text: str, value: object) -> None:
    assert parse(text) == value
    assert type(parse(text)) is type(value)


def test_control_characters_are_a_mistake_with_a_line() -> None:
    with pytest.raises(YamlError) as caught:
        parse("a: \x00")
    assert caught.value.line == 1


@pytest.mark.parametrize(
    "text", ["1e-4", "off", "1:30", "0x10", "null", "", "a, b", "- a", "# a", "a\nb", "'", "=", "é"]
)
def test_a_text_stays_a_text_in_any_yaml_reader(text: str) -> None:
    assert parse(dump_value(text)) == yaml.safe_load(dump_value(text)) == text
    assert parse(dump_value([text, {"a": text}])) == [text, {"a": text}]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(VALUES)
def test_a_written_value_is_read_back_as_the_same(value: object) -> None:
    line = dump_value(value)
    assert "\n" not in line
    assert parse(line) == value
