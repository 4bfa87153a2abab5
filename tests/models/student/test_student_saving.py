"""A saved student loads in transformers as it was, or is not there at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpkd.errors import DpkdError
from dpkd.models.loading import load_model, load_tokenizer
from dpkd.models.lora import add_lora
from dpkd.models.saving import save_model
from dpkd.models.settings import LoraSettings, ModelSettings, StudentSettings
from dpkd.models.student_init import make_student


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_a_student_of_layers_loads_as_it_was(teacher: Any, tokenizer: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    settings = StudentSettings(init="layers", layers=[0, 2, 5], dropout="off")
    student = make_student(settings, teacher=teacher, device="cpu", seed=0)
    save_model(student, tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded, ids), logits(student, ids))
    assert loaded.dtype == torch.float32
    # Dropout was off for this run only: the configuration is the teacher's.
    dropouts = {k: v for k, v in teacher.config.to_dict().items() if "drop" in k}
    assert dropouts
    assert dropouts.items() <= loaded.config.to_dict().items()
    ours = load_model(ModelSettings(model=str(tmp_path / "model")), device="cpu", dtype=None)
    assert torch.equal(logits(ours, ids), logits(student, ids))


def test_only_safetensors_json_and_the_template_are_written(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    save_model(llama, tokenizer, tmp_path / "run" / "model")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["model"]
    files = sorted(p.name for p in (tmp_path / "run" / "model").iterdir())
    assert "model.safetensors" in files
    assert {Path(name).suffix for name in files} == {".safetensors", ".json", ".jinja"}


def test_tokenizer_and_chat_template_load(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    save_model(llama, tokenizer, tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    chat = [{"role": "user", "content": "a b c"}]
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.apply_chat_template(chat, tokenize=False) == "<s>a b c</s>"
    assert loaded("a b z </s>")["input_ids"] == tokenizer("a b z </s>")["input_ids"] == [3, 4, 0, 2]
    assert loaded.pad_token == loaded.eos_token == "</s>"
    assert load_tokenizer(ModelSettings(model=str(tmp_path / "model"))).get_vocab() == tokenizer.get_vocab()


def test_saving_is_silent(llama: Any, tokenizer: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_model(llama, tokenizer, tmp_path / "model")
    assert capfd.readouterr() == ("", "")


def test_an_older_model_is_replaced_whole(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "leftover.txt").write_text("old")
    save_model(llama, tokenizer, folder)
    assert not (folder / "leftover.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_older_model(
    llama: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    save_model(llama, tokenizer, folder)
    before = load_file(folder / "model.safetensors")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched, torch.no_grad():
        llama.lm_head.weight.zero_()
        patched.setattr(type(tokenizer), "save_pretrained", full)
        with pytest.raises(DpkdError, match="no space left"):
            save_model(llama, tokenizer, folder)
    kept = load_file(folder / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in before.items())
    save_model(llama, tokenizer, folder)  # what the failure left behind is in nobody's way
    assert not load_file(folder / "model.safetensors")["lm_head.weight"].any()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated", "ignore:fan_in_fan_out is set")
def test_adapters_are_saved_merged_and_apart(teacher: Any, tokenizer: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters need peft")
    teacher.double().save_pretrained(tmp_path / "base")
    model = add_lora(teacher, LoraSettings(r=2)).double()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    expected = logits(model, ids)
    save_model(model, tokenizer, tmp_path / "run" / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert not hasattr(loaded, "peft_config")
    torch.testing.assert_close(logits(loaded, ids), expected, atol=1e-9, rtol=1e-9)
    assert torch.equal(logits(model, ids), expected)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["adapter", "model"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    apart = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    torch.testing.assert_close(logits(apart, ids), expected, atol=1e-9, rtol=1e-9)
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert stored
    assert all("lora_" in name for name in stored)


def test_an_unusual_generation_config_does_not_stop_the_save(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    # Published models have sampling numbers without do_sample; a run must not fail on them at its very end.
    llama.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(
        json.dumps({"temperature": 0.9, "top_p": 0.6, "eos_token_id": [2, 5]})
    )
    teacher = load_model(ModelSettings(model=str(tmp_path / "base")), device="cpu", dtype=None)
    student = make_student(StudentSettings(init="layers", layers=2), teacher=teacher, device="cpu", seed=0)
    save_model(student, tokenizer, tmp_path / "model")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config.eos_token_id == [2, 5]
