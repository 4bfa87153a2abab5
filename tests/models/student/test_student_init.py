"""Students made of a teacher's layers, from scratch, or from a folder."""

from __future__ import annotations

import itertools
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig
from transformers.cache_utils import DynamicCache

from dpkd.errors import DpkdError
from dpkd.models.loading import count_parameters, load_model
from dpkd.models.settings import ModelSettings, StudentSettings
from dpkd.models.student_init import even_layers, make_student, student_config

LAYERS = {"llama": "model.layers", "qwen2": "model.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers"}


def student_of(teacher: Any, seed: int = 0, **settings: Any) -> Any:
    settings = {"init": "layers", **settings}
    return make_student(StudentSettings(**settings), teacher=teacher, device="cpu", seed=seed).eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def layers_of(model: Any) -> torch.nn.ModuleList:
    return model.get_submodule(LAYERS[model.config.model_type])


@pytest.mark.parametrize(
    ("count", "of", "kept"),
    [
        (1, 6, [0]),
        (2, 6, [0, 5]),
        (3, 5, [0, 2, 4]),
        (4, 4, [0, 1, 2, 3]),
        (3, 31, [0, 15, 30]),
        (6, 11, [0, 2, 4, 6, 8, 10]),
    ],
)
def test_even_layers(count: int, of: int, kept: list[int]) -> None:
    assert even_layers(count, of) == kept


def test_even_layers_are_distinct_ordered_and_near_even() -> None:
    cases = [(count, of) for of in range(2, 40) for count in range(2, of + 1)]
    assert cases
    for count, of in cases:
        kept = even_layers(count, of)
        gaps = [b - a for a, b in itertools.pairwise(kept)]
        assert (len(kept), kept[0], kept[-1]) == (count, 0, of - 1)
        assert min(gaps) >= 1
        assert max(gaps) - min(gaps) <= 1, (count, of)


def test_all_layers_give_the_teachers_logits(teacher: Any, ids: torch.Tensor) -> None:
    assert torch.equal(logits(student_of(teacher, layers=6), ids), logits(teacher, ids))


@pytest.mark.parametrize("layers", [3, [0, 3, 5], [4, 1]])
def test_kept_layers_equal_the_teachers_and_so_does_the_rest(teacher: Any, layers: Any) -> None:
    kept = even_layers(layers, 6) if isinstance(layers, int) else layers
    student = student_of(teacher, layers=layers)
    prefix = f"{LAYERS[teacher.config.model_type]}."
    expected = {}
    for name, value in teacher.state_dict().items():
        if not name.startswith(prefix):
            expected[name] = value
    for new, old in enumerate(kept):
        for name, value in layers_of(teacher)[old].state_dict().items():
            expected[f"{prefix}{new}.{name}"] = value
    found = student.state_dict()
    assert set(found) == set(expected)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_a_student_computes_what_the_teacher_computes_without_the_other_layers(teacher: Any, ids: torch.Tensor) -> None:
    # The oracle: the teacher itself, its other layers skipped by hooks that hand their input on.
    student = student_of(teacher.double(), layers=[0, 2, 5]).double()
    for number in (1, 3, 4):
        layer = layers_of(teacher)[number]
        as_tuple = isinstance(layer(torch.zeros(1, 1, 16).double(), **_rotary(teacher)), tuple)
        layer.register_forward_hook(
            lambda module, args, kwargs, output, t=as_tuple: (
                (args[0] if args else kwargs["hidden_states"],) if t else (args[0] if args else kwargs["hidden_states"])
            ),
            with_kwargs=True,
        )
    torch.testing.assert_close(logits(student, ids), logits(teacher, ids), atol=1e-9, rtol=1e-9)


def _rotary(model: Any) -> dict[str, Any]:
    if not hasattr(model, "model") or not hasattr(model.model, "rotary_emb"):
        return {}
    positions = torch.zeros(1, 1, dtype=torch.long)
    return {"position_embeddings": model.model.rotary_emb(torch.zeros(1, 1, 16), positions)}


def test_weights_are_copied_and_not_shared(teacher: Any, ids: torch.Tensor) -> None:
    before = logits(teacher, ids)
    student = student_of(teacher, layers=6)
    owned = {p.data_ptr() for p in teacher.parameters()}
    assert owned.isdisjoint(p.data_ptr() for p in student.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    student.config.vocab_size = 1
    student.generation_config.eos_token_id = 1
    assert torch.equal(logits(teacher, ids), before)
    assert teacher.config.vocab_size == 64
    assert teacher.generation_config.eos_token_id == 2


def test_tied_heads_stay_tied_and_untied_ones_apart(teacher: Any) -> None:
    def tied(model: Any) -> bool:
        return model.get_output_embeddings().weight is model.get_input_embeddings().weight

    assert tied(teacher) == teacher.config.tie_word_embeddings
    assert tied(student_of(teacher, layers=3)) == tied(teacher)


def test_configuration_follows_and_the_teachers_stays(teacher: Any) -> None:
    student = student_of(teacher, layers=[0, 5])
    assert student.config.num_hidden_layers == len(layers_of(student)) == 2
    assert teacher.config.num_hidden_layers == 6
    indices = {m.layer_idx for m in student.modules() if hasattr(m, "layer_idx")}
    assert indices == {0, 1}
    settings = StudentSettings(init="layers", layers=[0, 5])
    planned = count_parameters(student_config(settings, teacher.config))
    assert planned == sum(p.numel() for p in student.parameters())


@pytest.mark.parametrize("teacher", ["qwen2"], indirect=True)
def test_layer_types_follow_their_layers(teacher: Any, tmp_path: Path) -> None:
    assert teacher.config.layer_types == ["full_attention"] * 3 + ["sliding_attention"] * 3
    student = student_of(teacher, layers=[0, 4, 2])
    expected = ["full_attention", "sliding_attention", "full_attention"]
    assert student.config.layer_types == expected
    student.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.layer_types == expected


@pytest.mark.parametrize("layers", [2, [5, 0, 3]])
def test_generation_with_a_cache_equals_generation_without(teacher: Any, ids: torch.Tensor, layers: Any) -> None:
    student = student_of(teacher, layers=layers)
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    cached = student.generate(ids, use_cache=True, **options)
    plain = ids
    for _ in range(8):
        plain = torch.cat([plain, logits(student, plain)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, plain)
    cache = DynamicCache(config=student.config)
    with torch.no_grad():
        student(input_ids=ids, past_key_values=cache, use_cache=True)
    assert len(cache) == student.config.num_hidden_layers


def test_a_bfloat16_teacher_gives_a_trainable_float32_student(llama: Any) -> None:
    teacher = deepcopy(llama).to(torch.bfloat16).requires_grad_(False)
    student = student_of(teacher, layers=2)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight.float())


@pytest.mark.parametrize("init", ["layers", "random"])
def test_a_bfloat16_student_keeps_its_rotary_frequencies(llama: Any, init: str) -> None:
    student = student_of(llama, init=init, layers=2, dtype="bfloat16")
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert torch.equal(student.model.rotary_emb.inv_freq, llama.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("layers", "words"),
    [(7, "7 layers asked for, but the teacher has 6"), ([0, 6, -1], r"\[6, -1\] do not exist; .* 0 to 5")],
)
@pytest.mark.parametrize("init", ["layers", "random"])
def test_layers_that_the_teacher_does_not_have(llama: Any, layers: Any, words: str, init: str) -> None:
    with pytest.raises(DpkdError, match=words):
        student_of(llama, init=init, layers=layers)


def test_layers_need_a_teacher() -> None:
    with pytest.raises(DpkdError, match="name a teacher with --teacher"):
        student_of(None, layers=2)


def test_a_model_whose_layers_are_not_one_list_is_refused(llama: Any) -> None:
    llama.model.more = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(6))
    with pytest.raises(DpkdError, match=r"2 lists of 6 layers in LlamaForCausalLM.*Llama, GPT-2, OPT, Qwen2"):
        student_of(llama, layers=2)


def test_layers_that_are_not_alike_are_refused(llama: Any) -> None:
    llama.model.layers[5].mlp.up_proj = torch.nn.Linear(16, 20, bias=False)
    with pytest.raises(DpkdError, match=r"the layers of LlamaForCausalLM differ, and layers \[0, 5\]"):
        student_of(llama, layers=2)


def test_other_decoders_work_too() -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, is_decoder=True
    )
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(config).eval()
    student = student_of(teacher, layers=2)
    ours, theirs = student.bert.encoder.layer[1].state_dict(), teacher.bert.encoder.layer[3].state_dict()
    assert ours
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_random_weights_are_seeded_and_not_the_teachers(teacher: Any, ids: torch.Tensor) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (student_of(teacher, init="random", layers=2, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(logits(first, ids), logits(again, ids))
    assert not torch.equal(logits(first, ids), logits(other, ids))
    assert not torch.equal(first.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert first.config.num_hidden_layers == 2
    assert student_of(teacher, init="random").config.num_hidden_layers == 6


def test_random_needs_only_a_configuration(llama: Any, tmp_path: Path) -> None:
    llama.config.save_pretrained(tmp_path)  # no weights in the folder
    assert student_of(None, init="random", model=str(tmp_path)).config.num_hidden_layers == 6
    with pytest.raises(DpkdError, match=r"9 layers asked for, but student\.model has 6"):
        student_of(None, init="random", model=str(tmp_path), layers=9)


def test_pretrained_is_the_folder_in_float32(llama: Any, ids: torch.Tensor, tmp_path: Path) -> None:
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.copy_(parameter.bfloat16())
    deepcopy(llama).bfloat16().save_pretrained(tmp_path)
    student = student_of(None, init="pretrained", model=str(tmp_path))
    assert torch.equal(logits(student, ids), logits(llama, ids))
    assert student_of(None, init="pretrained", model=str(tmp_path), dtype="bfloat16").dtype == torch.bfloat16


def test_dropout_is_the_models_own_or_none(teacher: Any, ids: torch.Tensor) -> None:
    for module in teacher.modules():  # Llama and Qwen2 have it only as a number
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    if hasattr(teacher.config, "attention_dropout"):
        teacher.config.attention_dropout = 0.5
    noisy, calm = (student_of(teacher, layers=6, dropout=dropout).train() for dropout in ("keep", "off"))
    assert not torch.equal(logits(noisy, ids), logits(noisy, ids))
    assert torch.equal(logits(calm, ids), logits(teacher.eval(), ids))
    assert noisy.config.to_dict() == calm.config.to_dict()


def test_a_real_model(shared_stories: str) -> None:
    teacher = load_model(ModelSettings(model=shared_stories), device="cpu", dtype=None)
    some = torch.randint(3, 512, (1, 24), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(student_of(teacher, layers=5), some), logits(teacher, some))
    apart = [float((logits(student_of(teacher, layers=n), some) - logits(teacher, some)).abs().mean()) for n in (4, 2)]
    assert 0 < apart[0] < apart[1]


def test_nothing_is_drawn_for_weights_that_the_teacher_gives(teacher: Any, monkeypatch: Any) -> None:
    """That would take seconds for 135 M parameters, and minutes for 7 B."""

    def drawn(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("a weight was drawn")

    for name in ("normal_", "uniform_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, drawn)
    student = student_of(teacher, layers=1)
    tied = student.config.tie_word_embeddings
    assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) == tied
    assert all(torch.isfinite(p).all() for p in student.state_dict().values())
