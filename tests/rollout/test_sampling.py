"""Sampling against `generate`, full forward passes and an independent NumPy sampler."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, Qwen2Config

from dpkd.api import Sampled, SamplingSettings
from dpkd.errors import DpkdError
from dpkd.rollout import continuous_batching as batch
from dpkd.rollout.sampling import sample

VOCABULARY, LONGEST, PAD = 29, 64, 0
EOS = {5, 9, 14, 21}
FAMILIES = {
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=LONGEST),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=32,
        max_position_embeddings=LONGEST,
        word_embed_proj_dim=16,
        dropout=0.1,
    ),
    "llama": lambda: LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LONGEST,
    ),
    "qwen2": lambda: Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LONGEST,
    ),
}
LENGTHS = (3, 11, 1, 7, 7, 5, 2)


def tiny(family: str, seed: int = 0, spread: float = 8.0) -> Any:
    """A float64 model whose next-token distributions are far from uniform."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread if "emb" in name or "wte" in name or "head" in name else 3.0)
    return model


def prompts_of(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    chance = np.random.default_rng(seed)
    return [chance.integers(1, VOCABULARY, length).tolist() for length in lengths]


def settings_of(**changes: Any) -> SamplingSettings:
    return SamplingSettings(**{"max_new_tokens": 12, "batch_size": 4, **changes})


DECODING = {"way": "eager"}


@pytest.fixture(params=["eager", "graph"], autouse=True)
def decoding(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[str]:
    """Every test is run with caches that grow, and with static shapes: without falling back."""
    monkeypatch.setitem(DECODING, "way", request.param)
    yield request.param
    assert "text.decoding" not in caplog.text


def drawn(model: Any, prompts: list[list[int]], settings: SamplingSettings, **more: Any) -> list[Sampled]:
    count = len(prompts) * more.get("num_generations", 1)
    defaults = {"eos_ids": EOS, "pad_id": PAD, "seeds": range(100, 100 + count), "decoding": DECODING["way"]}
    return sample(model, prompts, settings, **{**defaults, **more})


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def full_logits(model: Any, ids: list[int]) -> np.ndarray:
    """Logits after each token, from one pass over the whole sequence, without cache and padding."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].double().numpy()


def policy(
    student: np.ndarray, settings: SamplingSettings, teacher: np.ndarray | None = None, mix: float = 0.0
) -> np.ndarray:
    """The policy of one position by the definitions, with sorting and loops."""
    p = np.exp(log_softmax(student / settings.temperature))
    if teacher is not None:
        p = mix * np.exp(log_softmax(teacher / settings.temperature)) + (1 - mix) * p
    order = sorted(range(len(p)), key=lambda token: -p[token])
    if settings.top_k:
        order = order[: settings.top_k]
    share, kept = sum(p[token] for token in order), []
    for token in order:
        kept.append(token)
        if sum(p[k] for k in kept) >= settings.top_p * share:
            break
    filtered = np.zeros_like(p)
    filtered[kept] = p[kept]
    return filtered / filtered.sum()


def oracle(
    model: Any,
    prompt: list[int],
    settings: SamplingSettings,
    seed: int,
    eos: set[int],
    teacher: Any = None,
    mix: float = 0.0,
    vocabulary: int | None = None,
) -> Sampled:
    """One response, token by token, each from a full forward pass."""
    uniforms = np.random.default_rng(seed).random(settings.max_new_tokens)
    ids, logps, behaviour = [], [], []
    for u in uniforms:
        student = full_logits(model, prompt + ids)[-1, :vocabulary]
        theirs = full_logits(teacher, prompt + ids)[-1, :vocabulary] if teacher is not None else None
        p = policy(student, settings, theirs, mix)
        token = next(t for t in range(len(p)) if p[: t + 1].sum() > u)
        ids.append(token)
        logps.append(float(log_softmax(student)[token]))
        behaviour.append(float(np.log(p[token])))
        if token in eos:
            break
    return Sampled(
        tuple(ids),
        torch.tensor(logps, dtype=torch.float64),
        torch.tensor(behaviour, dtype=torch.float64),
        ids[-1] not in eos,
    )


def assert_same(got: list[Sampled], want: list[Sampled], tolerance: float = 1e-9) -> None:
    assert len(got) == len(want) > 0
    for one, other in zip(got, want, strict=True):
        assert one.response_ids == other.response_ids
        assert one.truncated == other.truncated
        np.testing.assert_allclose(one.logps, other.logps, rtol=0, atol=tolerance)
        np.testing.assert_allclose(one.behaviour_logps, other.behaviour_logps, rtol=0, atol=tolerance)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


POLICIES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.6},
    "all": {"temperature": 1.6, "top_k": 6, "top_p": 0.8},
}


@pytest.mark.parametrize("changes", POLICIES.values(), ids=POLICIES)
def test_equals_the_numpy_sampler(model: Any, changes: dict[str, Any]) -> None:
    prompts, settings = prompts_of(), settings_of(**changes)
    want = [oracle(model, prompt, settings, 100 + i, EOS) for i, prompt in enumerate(prompts)]
    got = drawn(model, prompts, settings)
    assert_same(got, want)
    assert len({len(one.response_ids) for one in got}) > 1, "no row left early: the test shows nothing"
    if not changes:
        assert all(torch.equal(one.logps, one.behaviour_logps) for one in got)


@pytest.mark.parametrize("changes", POLICIES.values(), ids=POLICIES)
def test_teacher_mix_equals_the_numpy_sampler(changes: dict[str, Any]) -> None:
    model, teacher = tiny("gpt2"), tiny("llama", seed=1)
    prompts, settings = prompts_of(), settings_of(**changes)
    want = [oracle(model, prompt, settings, 100 + i, EOS, teacher, mix=0.4) for i, prompt in enumerate(prompts)]
    got = drawn(model, prompts, settings, mix_with=teacher, mix=0.4)
    assert_same(got, want)
    alone = drawn(model, prompts, settings)
    assert [one.response_ids for one in got] != [one.response_ids for one in alone]


@pytest.mark.parametrize("changes", POLICIES.values(), ids=POLICIES)
def test_a_veto_lets_the_teacher_draw_where_the_student_is_far_off(changes: dict[str, Any]) -> None:
    """Token by token from full forward passes: q on the teacher's likeliest, the rest of its mass drawn from p."""
    model, teacher, veto = tiny("gpt2"), tiny("llama", seed=1), 5
    prompts, settings = prompts_of(), settings_of(**changes)
    got = drawn(model, prompts, settings, mix_with=teacher, veto=veto)
    outside = 0
    for i, (prompt, one) in enumerate(zip(prompts, got, strict=True)):
        uniforms = np.random.default_rng(100 + i).random(settings.max_new_tokens)
        for place, (token, u) in enumerate(zip(one.response_ids, uniforms, strict=False)):
            ids = [*prompt, *one.response_ids[:place]]
            student, theirs = (full_logits(m, ids)[-1] for m in (model, teacher))
            q, p = policy(student, settings), policy(theirs, settings)
            best = np.isin(np.arange(VOCABULARY), np.argsort(-theirs)[:veto])
            chances = np.where(best, q, 0.0) + q[~best].sum() * p
            assert token == next(t for t in range(VOCABULARY) if chances[: t + 1].sum() > u)
            assert one.behaviour_logps[place] == pytest.approx(np.log(chances[token]), abs=1e-9)
            outside += q[~best].sum() > 0
    assert outside > 0, "nothing was ever vetoed: the test shows nothing"


def test_a_veto_over_the_whole_vocabulary_changes_nothing() -> None:
    model, teacher = tiny("gpt2"), tiny("llama", seed=1)
    alone = drawn(model, prompts_of(), settings_of())
    assert_same(drawn(model, prompts_of(), settings_of(), mix_with=teacher, veto=VOCABULARY), alone)


def test_shared_vocabulary(model: Any) -> None:
    prompts, settings = prompts_of(), settings_of()
    want = [oracle(model, p, settings, 100 + i, {5}, vocabulary=8) for i, p in enumerate(prompts)]
    got = drawn(model, prompts, settings, vocabulary=8, eos_ids={5})
    assert_same(got, want)
    assert all(max(one.response_ids) < 8 for one in got)


def test_greedy_equals_generate(model: Any) -> None:
    prompts = prompts_of()
    got = drawn(model, prompts, settings_of(temperature=0))
    for prompt, one in zip(prompts, got, strict=True):
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=sorted(EOS),
            pad_token_id=PAD,
        )
        assert one.response_ids == tuple(out[0, len(prompt) :].tolist())
        assert not one.behaviour_logps.any()
        after = log_softmax(full_logits(model, prompt + list(one.response_ids)))[len(prompt) - 1 : -1]
        want = after[range(len(one.response_ids)), one.response_ids]
        np.testing.assert_allclose(one.logps, want, atol=1e-9)


def test_greedy_mix_takes_the_likeliest_of_the_mixture() -> None:
    model, teacher = tiny("gpt2"), tiny("llama", seed=1)
    got = drawn(model, prompts_of(), settings_of(temperature=0, max_new_tokens=1), mix_with=teacher, mix=0.5)
    for prompt, one in zip(prompts_of(), got, strict=True):
        mixed = np.exp([log_softmax(full_logits(m, prompt)[-1]) for m in (model, teacher)]).mean(0)
        assert one.response_ids == (int(mixed.argmax()),)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_batch_does_not_matter(model: Any, batch_size: int) -> None:
    prompts = prompts_of()
    alone = [drawn(model, [p], settings_of(), seeds=[100 + i])[0] for i, p in enumerate(prompts)]
    assert_same(drawn(model, prompts, settings_of(batch_size=batch_size)), alone)
    backwards = drawn(model, prompts[::-1], settings_of(batch_size=batch_size), seeds=range(106, 99, -1))
    assert_same(backwards[::-1], alone)


@pytest.mark.parametrize("turnover", [0.01, 0.5, 1.0])
def test_when_rows_leave_does_not_matter(monkeypatch: pytest.MonkeyPatch, turnover: float) -> None:
    model = tiny("gpt2")
    want = drawn(model, prompts_of(), settings_of())
    monkeypatch.setattr(batch, "TURNOVER", turnover)
    assert_same(drawn(model, prompts_of(), settings_of()), want)


def test_caches_that_cannot_be_joined(decoding: str, caplog: pytest.LogCaptureFixture) -> None:
    config = FAMILIES["qwen2"]()
    config.layer_types, config.sliding_window, config.use_sliding_window = ["sliding_attention"] * 2, 4, True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    prompts = prompts_of()
    want = [oracle(model, p, settings_of(), 100 + i, EOS) for i, p in enumerate(prompts)]
    assert_same(drawn(model, prompts, settings_of(batch_size=3)), want)
    assert ("eager, because static shapes do not work here: its cache is more than" in caplog.text) == (
        decoding == "graph"
    )
    caplog.clear()


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_several_samples_share_the_prompt(model: Any, batch_size: int) -> None:
    prompts, settings = prompts_of(LENGTHS[:3]), settings_of(batch_size=batch_size)
    got = drawn(model, prompts, settings, num_generations=3)
    repeated = [prompt for prompt in prompts for _ in range(3)]
    assert_same(got, drawn(model, repeated, settings))
    assert len({one.response_ids for one in got[:3]}) > 1


def test_the_prompt_is_read_once_for_all_its_samples() -> None:
    model = tiny("gpt2")
    read = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    drawn(model, prompts_of((6,)), settings_of(), num_generations=4)
    assert read[0] == (1, 6)
    assert all(shape[1] == 1 for shape in read[1:])


def test_a_shorter_limit_gives_a_prefix() -> None:
    model = tiny("llama")
    long, short = (drawn(model, prompts_of(), settings_of(max_new_tokens=n), eos_ids=()) for n in (12, 5))
    for one, other in zip(long, short, strict=True):
        assert one.response_ids[:5] == other.response_ids
        assert one.truncated
        assert other.truncated


def test_stops_where_the_model_is_full(model: Any) -> None:
    prompts = prompts_of((LONGEST - 3, LONGEST - 1, 4))
    got = drawn(model, prompts, settings_of(), eos_ids=())
    assert [len(one.response_ids) for one in got] == [3, 1, 12]
    assert all(one.truncated for one in got)
    want = oracle(model, prompts[0], settings_of(max_new_tokens=3), 100, set())
    assert_same(got[:1], [want])
    with pytest.raises(DpkdError, match=r"prompt 1 has 64 tokens.*at most 64.*max_prompt_tokens"):
        drawn(model, prompts_of((3, LONGEST)), settings_of())


def test_modes_come_back() -> None:
    model = tiny("gpt2").train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    seen = []
    handle = model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    drawn(model, prompts_of(), settings_of())
    handle.remove()
    assert set(seen) == {False}
    assert [module.training for module in model.modules()] == before

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.transformer.h[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        drawn(model, prompts_of(), settings_of())
    handle.remove()
    assert [module.training for module in model.modules()] == before


def test_training_goes_on_after_sampling(model: Any) -> None:
    model.train()
    inference = []
    handle = model.register_forward_pre_hook(lambda *_: inference.append(torch.is_inference_mode_enabled()))
    drawn(model, prompts_of(), settings_of())
    handle.remove()
    assert set(inference) == {False}  # a tensor that a model keeps would be lost to autograd
    ids = torch.tensor(prompts_of((9,)))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_dropout_is_off() -> None:
    model = tiny("opt").train()
    assert_same(drawn(model, prompts_of(), settings_of()), drawn(model, prompts_of(), settings_of()), tolerance=0)


def test_no_global_random_numbers_are_used() -> None:
    model = tiny("gpt2")
    before = torch.get_rng_state()
    drawn(model, prompts_of(), settings_of())
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_differ_in_all_their_bits() -> None:
    model = tiny("gpt2", spread=1.0)
    high = drawn(model, prompts_of((4,)) * 3, settings_of(), eos_ids=(), seeds=[7, 7 + 2**32, 7 + 2**60])
    assert len({one.response_ids for one in high}) == 3


def test_reports_what_is_finished() -> None:
    early: dict[int, Sampled] = {}
    got = drawn(tiny("gpt2"), prompts_of(), settings_of(batch_size=2), on_finished=early.__setitem__)
    assert [early[i] for i in range(len(got))] == got


def test_empty_inputs() -> None:
    model = tiny("gpt2")
    assert drawn(model, [], settings_of()) == []
    with pytest.raises(DpkdError, match="prompt 1 has no tokens"):
        drawn(model, [[3], []], settings_of())


def test_wrong_arguments() -> None:
    model = tiny("gpt2")
    with pytest.raises(ValueError, match="need as many seeds, got 1"):
        drawn(model, prompts_of((2, 2)), settings_of(), seeds=[1])
    with pytest.raises(ValueError, match=r"mixture weight lies in \[0, 1\], got 1.5"):
        drawn(model, prompts_of((2,)), settings_of(), mix_with=model, mix=1.5)
    wider = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(DpkdError, match=r"student draws from 29 tokens and the teacher .* from 40"):
        drawn(model, prompts_of((2,)), settings_of(), mix_with=wider, mix=0.5)


def test_broken_weights_are_named() -> None:
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight[3, 0] = float("nan")
    for changes in ({}, {"temperature": 0}, {"top_p": 0.5}, {"top_k": 3}):
        with pytest.raises(DpkdError, match="logits that are not numbers"):
            drawn(model, prompts_of((4,)), settings_of(**changes))


def test_bfloat16_is_drawn_in_float32() -> None:
    model = tiny("llama", spread=2.0).bfloat16()
    for one in drawn(model, prompts_of(), settings_of()):
        assert one.logps.isfinite().all()
        as_bf16 = one.logps.bfloat16().float()
        assert (one.logps - as_bf16).abs().max() > 0  # computed with more bits than bfloat16 has


def test_first_tokens_have_the_distribution_of_the_model() -> None:
    from scipy.stats import chisquare

    model, draws = tiny("gpt2", spread=1.5), 4000
    prompt = prompts_of((5,))
    settings = settings_of(max_new_tokens=1, batch_size=draws)
    got = drawn(model, prompt, settings, num_generations=draws, seeds=range(draws))
    counts = np.bincount([one.response_ids[0] for one in got], minlength=VOCABULARY)
    expected = np.exp(log_softmax(full_logits(model, prompt[0])[-1])) * draws
    assert expected.min() > 5
    assert chisquare(counts, expected).pvalue > 0.001


def test_pretrained_model() -> None:
    root = Path(os.environ.get("DPKD_SHARED", Path(__file__).parents[3] / "shared"))
    folder = root / "models" / "stories260K"
    if not folder.exists():
        pytest.skip(f"no {folder}: set DPKD_SHARED to the folder of the shared models")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    prompts = [[1, 403, 407, 261, 378][:n] for n in (5, 1, 3)]
    settings = settings_of(max_new_tokens=20, temperature=0.8, top_p=0.9)
    want = [oracle(model, p, settings, 100 + i, {2}) for i, p in enumerate(prompts)]
    assert_same(drawn(model, prompts, settings, eos_ids={2}), want)
