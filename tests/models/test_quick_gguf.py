"""What is read from a .gguf file, faster, is what transformers reads by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizer_kinds import build_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from dpkd.models.loading import config_of, load_model, load_tokenizer, quiet_transformers
from dpkd.models.quick_gguf import quick_gguf
from dpkd.models.settings import ModelSettings

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'dpkd[demo]'")
LAYERS, WIDTH, INNER, HEADS = 3, 64, 96, 4
LAYER = {
    "attn_norm": (WIDTH,),
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH, WIDTH),
    "attn_v": (WIDTH, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_norm": (WIDTH,),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with 8-bit weights and a byte-level tokenizer."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    tokens = ["th", *sorted((vocabulary := build_tokenizer().get_vocab()), key=vocabulary.__getitem__)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(len(tokens) - 1)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in LAYER.items()}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = random.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_reads_the_same(file: Path) -> None:
    settings, place = ModelSettings(model=str(file)), {"gguf_file": file.name}
    with quiet_transformers():
        config = AutoConfig.from_pretrained(file.parent, **place)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **place)
        weights = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **place).state_dict()
    assert isinstance(config, LlamaConfig)
    assert config_of(settings).to_dict() == config.to_dict()
    assert load_tokenizer(settings).get_vocab() == tokenizer.get_vocab()
    found = load_model(settings, device="cpu", dtype=torch.float32).state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_names_are_mapped_once_and_no_slice_is_a_memory_map(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, make = [], gguf.get_tensor_name_map
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *about: calls.append(about) or make(*about))
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with quick_gguf(str(file)):
        reader = gguf.GGUFReader(file)
        assert {type(part) for field in reader.fields.values() for part in field.parts} == {np.ndarray}
        load_model(ModelSettings(model=str(file)), device="cpu", dtype=None)
    assert len(calls) == 1
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


@pytest.mark.parametrize("name", ["folder", "small.gguf"])
def test_what_is_not_there_is_not_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(gguf, "GGUFReader")
    before = gguf.get_tensor_name_map
    with quick_gguf(name):
        assert (gguf.get_tensor_name_map is before) == (name == "folder")
        assert not hasattr(gguf, "GGUFReader")
    assert gguf.get_tensor_name_map is before
