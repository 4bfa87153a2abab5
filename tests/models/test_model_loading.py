"""Loading from folders, and the sentence for each way in which that goes wrong."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GPT2Config, LlamaConfig, OPTConfig, Qwen2Config

from dpkd.errors import DpkdError
from dpkd.models.loading import config_of, count_parameters, load_model, load_tokenizer, new_model
from dpkd.models.settings import ModelSettings, TeacherSettings

WEIGHT = "model.layers.1.mlp.up_proj.weight"


def load(folder: Any, default: torch.dtype | None = None, **settings: Any) -> Any:
    return load_model(ModelSettings(model=str(folder), **settings), device="cpu", dtype=default)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "spoilt"))


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_folder_is_loaded_as_it_is_stored(tiny_folder: Path) -> None:
    model = load(tiny_folder)
    stored = load_file(tiny_folder / "model.safetensors")
    assert stored
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored[name]), name


@pytest.mark.parametrize(
    ("setting", "argument", "expected"),
    [
        ("auto", None, torch.bfloat16),
        ("auto", torch.float32, torch.float32),
        ("float16", torch.float32, torch.float16),
        ("float32", None, torch.float32),
    ],
)
def test_dtype_setting_wins_over_argument_wins_over_stored(
    tiny_folder: Path, tmp_path: Path, setting: Any, argument: torch.dtype | None, expected: torch.dtype
) -> None:
    load(tiny_folder, torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path, argument, dtype=setting).dtype == expected


def test_attention_setting_arrives(tiny_folder: Path) -> None:
    assert load(tiny_folder, attention="eager").config._attn_implementation == "eager"
    with pytest.raises(DpkdError, match="FlashAttention2"):
        load(tiny_folder, attention="flash_attention_2")


def test_loading_is_silent(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(tiny_folder)
    load_tokenizer(ModelSettings(model=str(tiny_folder)))
    assert capfd.readouterr() == ("", "")


def test_a_path_to_nothing_names_the_nearest(tiny_folder: Path) -> None:
    for read in (load, lambda name: config_of(ModelSettings(model=name))):
        with pytest.raises(DpkdError, match=r"the folder .*/lama does not exist\. Did you mean .*/llama\?"):
            read(str(tiny_folder.with_name("lama")))


def test_a_file_is_no_model(tiny_folder: Path) -> None:
    with pytest.raises(DpkdError, match=r"is a file; expected the folder"):
        load(tiny_folder / "model.safetensors")


def test_without_a_network_the_hub_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def no_address(host: str, *rest: Any) -> None:
        asked.append(host)
        raise socket.gaierror("no name server")

    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    with pytest.raises(
        DpkdError, match=r"some-such/model is not a local folder, and the hub did not provide its model"
    ):
        load("some-such/model")
    with pytest.raises(DpkdError, match=r"is not a local folder, and the hub did not provide its tokenizer"):
        load_tokenizer(ModelSettings(model="some-such/model"))
    assert 2 <= len(asked) <= 3  # once for each, once for the client's user agent; a request would retry five times


def test_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(DpkdError, match=r"no model weights: expected model\.safetensors"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(DpkdError, match=r"pytorch_model\.bin but no safetensors.*save_pretrained"):
        load(folder)


def test_remote_code_is_refused_without_a_question(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(
        folder / "config.json",
        model_type="unheard-of",
        auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
    )
    (folder / "own.py").write_text("raise SystemExit('remote code ran')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for read in (load, lambda name: config_of(ModelSettings(model=str(name)))):
        with pytest.raises(DpkdError, match="contains Python code, which is not run by default"):
            read(folder)


def test_remote_code_runs_when_it_is_trusted(folder: Path) -> None:
    edit(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig):\n    model_type = 'own'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
    )
    trusted = ModelSettings(model=str(folder), trust_remote_code=True)
    counted = count_parameters(config_of(trusted))  # before a load, which would register the classes
    model = load_model(trusted, device="cpu", dtype=None)
    assert type(model).__name__ == "M"
    assert counted == sum(p.numel() for p in model.parameters())


def test_a_missing_weight_is_an_error_and_not_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(WEIGHT)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DpkdError, match=rf"lacks 1 of the weights .* {WEIGHT}"):
        load(folder)


def test_a_weight_of_another_shape_is_named(folder: Path) -> None:
    edit(folder / "config.json", intermediate_size=20)
    with pytest.raises(DpkdError, match=r"has the shape \(16, 24\), but config.json describes \(16, 20\)"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", b"\x00" * 100, "the model of .*spoilt cannot be loaded: .*[Hh]eader"),
        ("config.json", b"{", "not a valid JSON file"),
        ("config.json", b'{"model_type": "zorglub"}', "zorglub"),
        ("config.json", b'{"model_type": "t5"}', "T5Config"),
    ],
)
def test_broken_files_are_named(folder: Path, file: str, content: bytes, words: str) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(DpkdError, match=words):
        load(folder)


def test_gguf_mistakes(tmp_path: Path) -> None:
    (tmp_path / "one.gguf").write_bytes(b"GGUFnonsense")
    with pytest.raises(
        DpkdError, match=r"two\.gguf does not exist; expected a \.gguf file\. Did you mean .*one\.gguf\?"
    ):
        load(tmp_path / "two.gguf")
    with pytest.raises(DpkdError, match=r"the model of .*one\.gguf cannot be read"):
        load(tmp_path / "one.gguf")


def test_pad_is_eos_where_there_is_none_and_the_folder_stays(tiny_folder: Path) -> None:
    before = (tiny_folder / "tokenizer_config.json").read_bytes()
    tokenizer = load_tokenizer(ModelSettings(model=str(tiny_folder)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 256
    assert (tiny_folder / "tokenizer_config.json").read_bytes() == before


def test_an_own_pad_token_stays(tmp_path: Path, tokenizer_of: Any) -> None:
    tokenizer_of("<pad>", pad_token="<pad>").save_pretrained(tmp_path)
    assert load_tokenizer(ModelSettings(model=str(tmp_path))).pad_token == "<pad>"


def test_a_tokenizer_named_beside_the_model_is_taken(tiny_folder: Path, tmp_path: Path, tokenizer_of: Any) -> None:
    tokenizer_of("<other>").save_pretrained(tmp_path)
    settings = TeacherSettings(model=str(tiny_folder), tokenizer=str(tmp_path))
    assert "<other>" in load_tokenizer(settings).get_vocab()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "model_max_length",
            "many",
            r"expected a number of tokens as `model_max_length` in tokenizer_config\.json, found 'm",
        ),
        ("model_max_length", {"a": 1}, r"`model_max_length` in tokenizer_config\.json, found \"{'a': 1}\""),
        ("truncation_side", 3, "the tokenizer of .* cannot be loaded: "),
        ("unk_token", "", "the tokenizer of .* cannot be loaded: RecursionError"),
    ],
)
def test_a_damaged_setting_of_a_tokenizer_is_named(
    key: str, value: Any, message: str, tmp_path: Path, tokenizer_of: Any
) -> None:
    tokenizer_of().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(DpkdError, match=message):
        load_tokenizer(ModelSettings(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", -1, r"config\.json: num_hidden_layers: expected an integer from 1 to 10,000, found '-1'"),
        ("num_hidden_layers", 10**30, r"num_hidden_layers: expected an integer from 1 to 10,000, found '1000"),
        ("sliding_window", "x", r"sliding_window: expected an integer from -1 to [\d,]+, found 'x'"),
        ("dtype", 1, r"expected a type such as bfloat16 as `dtype` in config\.json, found 1"),
        ("head_dim", 0, "makes no causal language model: ZeroDivisionError"),
        ("intermediate_size", -1, "makes no causal language model: RuntimeError"),
        ("intermediate_size", 10**30, "makes no causal language model: "),
        ("hidden_act", "x", "makes no causal language model: KeyError: 'x'"),
    ],
)
def test_a_size_that_no_model_has_is_named(
    key: str, value: Any, message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """A sentence, not an error of whichever line met it first, and no making of layers without end."""
    values = json.loads((tiny_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {key: value}))
    with pytest.raises(DpkdError, match=message) as raised:
        count_parameters(config_of(ModelSettings(model=str(tmp_path))))
    assert str(tmp_path) in str(raised.value)


def test_no_eos_is_an_error(tmp_path: Path, tokenizer_of: Any) -> None:
    tokenizer_of(eos_token=None).save_pretrained(tmp_path)
    with pytest.raises(DpkdError, match="has no EOS token"):
        load_tokenizer(ModelSettings(model=str(tmp_path)))


@pytest.mark.parametrize(
    "config", [GPT2Config(), OPTConfig(), LlamaConfig(), Qwen2Config()], ids=lambda c: c.model_type
)
def test_a_folder_without_tokenizer_files_gives_no_empty_tokenizer(tmp_path: Path, config: Any) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(DpkdError, match="tokenizer"):
        load_tokenizer(ModelSettings(model=str(tmp_path)))


def test_configuration_alone_counts_the_parameters(tiny_folder: Path) -> None:
    config = config_of(ModelSettings(model=str(tiny_folder)))
    before = config.to_dict()
    # By hand: embeddings and head 260 · 16 each; a layer has 4 · 16² + 3 · 16 · 24 + 2 · 16; one norm of 16.
    assert count_parameters(config) == 2 * 260 * 16 + 2 * (4 * 16**2 + 3 * 16 * 24 + 2 * 16) + 16
    config.tie_word_embeddings = True
    assert count_parameters(config) == 260 * 16 + 2 * (4 * 16**2 + 3 * 16 * 24 + 2 * 16) + 16
    config.tie_word_embeddings = False
    assert config.to_dict() == before


def test_a_configuration_of_another_kind_makes_no_model() -> None:
    with pytest.raises(DpkdError, match="type t5 makes no causal language model"):
        new_model(AutoConfig.for_model("t5"))
