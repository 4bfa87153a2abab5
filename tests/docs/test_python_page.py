"""The Python of docs/python.md, docs/library.md and the README runs, on toy models under the names that they use."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ROW = {"instruction": "Name a colour.", "output": "Blue."}


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def tokenizer():
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    model = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory in which `gpt2-xl`, `gpt2` and `train.jsonl` are small."""
    from accelerate.state import AcceleratorState
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    for name, layers in (("gpt2-xl", 2), ("gpt2", 1)):
        config = LlamaConfig(
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=257,
            bos_token_id=256,
            eos_token_id=256,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPKD_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_page_runs_from_top_to_bottom(place, capsys):
    names: dict[str, object] = {}
    found = blocks("docs/python.md")
    assert len(found) == 5
    for code in found:
        exec(compile(code, "docs/python.md", "exec"), names)
    assert "runs/objects is finished: its model is runs/objects/model" in capsys.readouterr().out
    assert (place / "runs/kd/model").is_dir()


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # the trainers pin memory where there is no GPU, too
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")  # SFTConfig of TRL 1.16 sets it
def test_the_library_page_runs_from_top_to_bottom(place):
    names: dict[str, object] = {}
    found = blocks("docs/library.md")
    assert len(found) == 11
    for code in found:
        exec(compile(code, "docs/library.md", "exec"), names)
    assert names["loss"].item() > 0


def test_the_block_of_the_readme_runs(place):
    found = [code for code in blocks("README.md") if code.startswith("import dpkd")]
    assert len(found) == 1
    exec(compile(found[0], "README.md", "exec"), {})
    assert (place / "runs/kd-1/model").is_dir()
