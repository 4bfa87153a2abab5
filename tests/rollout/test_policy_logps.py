"""Drawing in bfloat16 does not bias a policy gradient: the expected gradient, summed over every token there is."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from dpkd_zoo.opd import OPDConfig, OPDLoss
from transformers import AutoModelForCausalLM, LlamaConfig

from dpkd.api import Rollout, RolloutInputs, Sampled, SamplingSettings, Signal
from dpkd.rollout.backends.hf import LowPrecisionCopy
from dpkd.rollout.policy_logps import PolicyScorer, truncated
from dpkd.rollout.sampling import sample

VOCABULARY = 31
PROMPT = [3, 9, 27, 4]


def model_of(seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model


@pytest.fixture
def policy() -> Any:
    return model_of(0)


@pytest.fixture
def scorer() -> PolicyScorer:
    return PolicyScorer(VOCABULARY, 0, torch.device("cpu"), nullcontext)


def next_logps(model: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return model(torch.tensor([PROMPT])).logits[0, -1].to(dtype).log_softmax(-1)


def gradient_from(policy: Any, drawn: list[Sampled], teacher_V: torch.Tensor, draw_V: torch.Tensor) -> torch.Tensor:
    """Expected gradient of the loss for the next-token logits, each token weighted by the chance that it is drawn."""
    ids = torch.tensor([one.response_ids[0] for one in drawn])
    rollout, behaviour = (torch.stack([getattr(one, n)[0] for one in drawn]) for n in ("logps", "behaviour_logps"))
    loss = OPDLoss(OPDConfig())
    worth = loss.advantages(Rollout(rollout, behaviour, teacher_V[ids], torch.arange(len(ids))))
    logits_V = policy(torch.tensor([PROMPT])).logits[0, -1].detach().requires_grad_()
    signals = {
        Signal.STUDENT_LOGITS: logits_V.expand(len(ids), -1),
        Signal.TARGETS: ids,
        Signal.TEACHER_LOGPS: teacher_V[ids],
        Signal.ADVANTAGES: worth,
        Signal.ROLLOUT_LOGPS: rollout,
        Signal.BEHAVIOUR_LOGPS: behaviour,
    }
    (loss(RolloutInputs(signals)) * draw_V[ids].exp()).sum().backward()
    assert logits_V.grad is not None
    return logits_V.grad


@torch.no_grad()
def test_the_expected_gradient_is_that_of_the_policy_that_is_trained(policy: Any, scorer: PolicyScorer) -> None:
    teacher_V, draw_V = next_logps(model_of(1)), next_logps(LowPrecisionCopy(policy).model)
    # Every token as the copy would draw it: with its own log-probs.
    every = [
        Sampled((token,), draw_V[token : token + 1], draw_V[token : token + 1], True) for token in range(VOCABULARY)
    ]
    with torch.enable_grad():
        logits_V = policy(torch.tensor([PROMPT])).logits[0, -1].detach().requires_grad_()
        log_q_V = logits_V.log_softmax(-1)
        (log_q_V.exp() * (log_q_V - teacher_V)).sum().backward()  # the reverse KL itself
        assert logits_V.grad is not None
        naive = gradient_from(policy, every, teacher_V, draw_V) - logits_V.grad
        scored = scorer(policy, [PROMPT] * VOCABULARY, every)
        exact = gradient_from(policy, scored, teacher_V, draw_V) - logits_V.grad
    assert exact.abs().max() < 1e-5
    assert naive.abs().max() > 100 * exact.abs().max(), "bfloat16 changes nothing here: the test shows nothing"


def test_log_probs_are_those_of_a_forward_and_the_behaviour_stays(policy: Any, scorer: PolicyScorer) -> None:
    prompts = [[5, 6, 7], [8], [1, 2, 3, 4, 5, 6]]
    drawn = sample(
        LowPrecisionCopy(policy).model,
        prompts,
        SamplingSettings(max_new_tokens=9, temperature=0.8),
        eos_ids={11},
        pad_id=0,
        seeds=range(3),
    )
    for prompt, one, scored in zip(prompts, drawn, scorer(policy, prompts, drawn), strict=True):
        with torch.no_grad():
            log_q = policy(torch.tensor([prompt + list(one.response_ids)])).logits[0].log_softmax(-1)
        want = log_q[range(len(prompt) - 1, len(prompt) + len(one.response_ids) - 1), one.response_ids]
        torch.testing.assert_close(scored.logps, want, atol=1e-5, rtol=1e-5)
        assert (scored.logps - one.logps).abs().max() > 1e-3
        assert scored.behaviour_logps is one.behaviour_logps
        assert replace(scored, logps=one.logps) == one


def test_a_copy_follows_the_weights_in_place(policy: Any) -> None:
    policy.tie_weights()
    copy = LowPrecisionCopy(policy)
    addresses = [p.data_ptr() for p in copy.model.parameters()]
    before = next_logps(copy.model)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05)
    assert torch.equal(next_logps(copy.model), before)
    copy.refresh()
    assert [p.data_ptr() for p in copy.model.parameters()] == addresses
    assert {p.dtype for p in copy.model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in copy.model.parameters())
    torch.testing.assert_close(next_logps(copy.model), next_logps(LowPrecisionCopy(policy).model))
    assert (next_logps(copy.model) - before).abs().max() > 0.01


def test_weights_for_rounding_are_truncated_at_two():
    """By hand: weights of 1.5, 3 and 0.1 become 1.5, 2 and 0.1; the policy's log-probs stay."""
    weights = torch.tensor([1.5, 3.0, 0.1], dtype=torch.float64)
    logps = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    (one,) = truncated([Sampled((1, 2, 3), logps, logps - weights.log(), False)])
    torch.testing.assert_close((one.logps - one.behaviour_logps).exp(), torch.tensor([1.5, 2.0, 0.1]).double())
    assert one.logps is logps
    assert math.isclose(float((one.logps - one.behaviour_logps).max()), math.log(2))
