"""Models in memory where a run asks for models: placed, copied, cast, and put back."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from dpkd.errors import DpkdError
from dpkd.models.in_memory import InMemory, given_model
from dpkd.models.settings import ModelSettings, TeacherSettings

NAME = "in-memory:teacher"
ELSEWHERE = torch.device("meta")  # stands in for a GPU


@pytest.fixture
def model():
    config = LlamaConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=11,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def given(model) -> InMemory:
    return InMemory({NAME: given_model("teacher", model, None)})


def test_one_on_the_cpu_follows_the_run(given, model):
    assert given.load(ModelSettings(model=NAME), device=ELSEWHERE, dtype=None) is model
    assert model.device == ELSEWHERE


def test_one_that_is_elsewhere_stays_unless_the_settings_say_where(given, model):
    model.to(ELSEWHERE)
    assert given.load(TeacherSettings(model=NAME), device="cpu", dtype=None).device == ELSEWHERE


def test_the_settings_may_say_where(given, model):
    assert given.load(TeacherSettings(model=NAME, device="meta"), device="cpu", dtype=None).device == ELSEWHERE


def test_a_copy_shares_nothing_keeps_ties_and_casts_parameters_alone(given, model):
    model.to(torch.bfloat16)
    model.model.rotary_emb.inv_freq = torch.tensor([1.0, 0.1234567])
    copy = given.load_copy(ModelSettings(model=NAME), device="cpu", dtype=torch.float32)
    assert copy.dtype == torch.float32
    assert model.dtype == torch.bfloat16
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    half = given.load_copy(ModelSettings(model=NAME, dtype="bfloat16"), device="cpu", dtype=torch.float32)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    with torch.no_grad():
        half.lm_head.weight.zero_()
    assert model.lm_head.weight.abs().sum() > 0


def test_modes_and_flags_are_put_back_even_after_an_error(given, model):
    model.train()
    model.model.norm.eval()
    model.model.norm.weight.requires_grad_(False)
    before = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]

    def use() -> None:
        with given.left_alone():
            given.load(ModelSettings(model=NAME), device="cpu", dtype=None).requires_grad_(False)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        use()
    assert before == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])


def test_the_configuration_is_a_copy(given, model):
    given.config(ModelSettings(model=NAME)).num_hidden_layers = 7
    assert model.config.num_hidden_layers == 1


def test_weights_that_are_not_loaded_and_names_that_nobody_gave_are_refused(model):
    with pytest.raises(DpkdError, match="student: some of its weights are not loaded"):
        given_model("student", model.to(ELSEWHERE), None)
    for what in ("config", "tokenizer", "fingerprint"):
        with pytest.raises(DpkdError, match="in-memory:teacher"):
            getattr(InMemory(), what)(ModelSettings(model=NAME))
