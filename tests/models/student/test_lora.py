"""Low-rank adapters: what is trained, what is frozen, what is merged."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch

from dpkd.errors import DpkdError
from dpkd.models.lora import add_lora, merged
from dpkd.models.settings import LoraSettings

pytest.importorskip("peft", reason="adapters need peft")


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def shake(model: Any) -> None:
    """Adapters start as a zero product: give them something to say."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)


def test_only_adapters_train_and_they_start_as_nothing(teacher: Any, ids: torch.Tensor) -> None:
    before = logits(teacher, ids)
    head = teacher.get_output_embeddings().weight
    model = add_lora(teacher, LoraSettings(r=2))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name or "embed" in name or "wte" in name for name in trained)
    assert model.get_base_model().get_output_embeddings().weight is head
    assert torch.equal(logits(model, ids), before)


def test_every_layer_gets_adapters_of_the_rank(llama: Any) -> None:
    model = add_lora(llama, LoraSettings(r=3, alpha=6))
    # Seven matrices in each of 6 layers, two adapters each.
    lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(lora) == 6 * 7 * 2
    assert all(3 in p.shape for p in lora.values())


def test_merged_is_a_plain_copy_with_the_same_logits(teacher: Any, ids: torch.Tensor) -> None:
    plain_type, tied = type(teacher), teacher.config.tie_word_embeddings
    model = add_lora(teacher.double(), LoraSettings(r=2)).double()
    before = logits(model, ids)
    shake(model)
    adapted = logits(model, ids)
    assert (adapted - before).abs().max() > 1e-3
    plain = merged(model)
    assert type(plain) is plain_type
    assert not any("lora" in name or "base_layer" in name for name in plain.state_dict())
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == tied
    torch.testing.assert_close(logits(plain, ids), adapted, atol=1e-9, rtol=1e-9)
    assert torch.equal(logits(model, ids), adapted)  # the model goes on with its adapters apart
    owned = {p.data_ptr() for p in model.parameters()}
    assert owned.isdisjoint(p.data_ptr() for p in plain.parameters())


def test_named_targets_alone_are_adapted(llama: Any) -> None:
    model = add_lora(llama, LoraSettings(r=2, targets=["q_proj", "mlp.up_proj"]))
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted == {"q_proj", "up_proj"}


def test_an_unknown_target_lists_the_known_ones(teacher: Any) -> None:
    with pytest.raises(DpkdError, match=r"targets: 'q_prj' names no module of \w+; it has [a-z_0-9, ]+$") as error:
        add_lora(teacher, LoraSettings(targets=["q_prj"]))
    assert "lm_head" not in str(error.value)


def test_one_unknown_target_among_known_ones_is_an_error(llama: Any) -> None:
    with pytest.raises(DpkdError, match="'v_prj' names no module"):
        add_lora(llama, LoraSettings(targets=["q_proj", "v_prj"]))


def test_the_head_is_never_adapted(teacher: Any) -> None:
    with pytest.raises(DpkdError, match="'lm_head' is the output head"):
        add_lora(teacher, LoraSettings(targets=["lm_head"]))


@pytest.mark.parametrize(
    ("teacher", "name"),
    [("gpt2", "wte"), ("opt", "embed_tokens"), ("llama-tied", "embed_tokens")],
    indirect=["teacher"],
)
def test_embeddings_tied_to_the_head_are_never_adapted(teacher: Any, name: str) -> None:
    with pytest.raises(DpkdError, match=f"'{name}' is the output head of .* or tied to it"):
        add_lora(teacher, LoraSettings(targets=[name]))


def test_without_peft_it_says_what_to_install(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_peft(name: str, *rest: Any, **more: Any) -> Any:
        if name == "peft":
            raise ImportError("no peft here")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_peft)
    with pytest.raises(DpkdError, match=r"pip install 'dpkd\[peft\]'"):
        add_lora(llama, LoraSettings())
