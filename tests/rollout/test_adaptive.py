"""Adaptive off-policy text: when φ rises, where a step's text comes from, and what the buffer keeps."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dpkd.api import Response, SourceContext, Text
from dpkd.data.batch_sampler import BatchSampler
from dpkd.data.encode import Prompt
from dpkd.rollout.adaptive import AdaptiveConfig, AdaptiveSource


def adaptive(steps: int = 1000, seed: int = 0, **settings: Any) -> AdaptiveSource:
    context = SourceContext([], BatchSampler([], batch_size=1, steps=steps, seed=seed), seed, frozenset())
    return AdaptiveSource(AdaptiveConfig(**settings), context)


def responses(count: int, first: int = 0) -> list[tuple[int, Response]]:
    return [(i, Response((i, 9), Text.STUDENT)) for i in range(first, first + count)]


def test_phi_rises_only_when_the_loss_is_above_that_of_the_last_rise() -> None:
    """By hand: 2.0 is noted; 1.5 and 2.05 are not above 2.1; 2.1 is; then 2.15 is not above 2.2, 2.3 is."""
    policy = adaptive()
    shares = []
    for loss in (2.0, 1.5, 2.05, 2.1, 2.15, 2.3):
        policy.observe(loss)
        shares.append(round(policy.share, 6))
    assert shares == [0.0, 0.0, 0.0, 0.1, 0.1, 0.2]
    assert policy.loss == 2.3
    for loss in range(3, 20):
        policy.observe(loss)
    assert policy.share == 1.0


@pytest.mark.parametrize(
    ("fresh", "shares"), [("decreasing", (0.9, 0.1)), ("increasing", (0.1, 0.9)), ("constant", (0.5, 0.5))]
)
def test_shares_of_the_text(fresh: str, shares: tuple[float, float]) -> None:
    """With φ = 0.6 and a full buffer, over many seeds, early and late in the run."""
    for step, share in zip((99, 899), shares, strict=True):
        choices = []
        for seed in range(4000):
            policy = adaptive(seed=seed, share=0.6, capacity=4, fresh=fresh)
            policy.add(responses(4))
            choices.append(policy.choose(step))
        assert choices.count("dataset") / 4000 == pytest.approx(0.4, abs=0.025)
        assert choices.count("fresh") / 4000 == pytest.approx(0.6 * share, abs=0.025)


def test_all_is_fresh_until_the_buffer_is_full_and_nothing_at_phi_0() -> None:
    policy = adaptive(share=1.0, capacity=4)
    policy.add(responses(3))
    assert {policy.choose(step) for step in range(1000)} == {"fresh"}
    policy.add(responses(1, first=3))
    assert policy.choose(999) == "replay"
    assert {adaptive().choose(step) for step in range(1000)} == {"dataset"}


def test_the_buffer_keeps_the_newest_and_gives_different_ones() -> None:
    policy = adaptive(capacity=5)
    policy.add(responses(8))
    assert [i for i, _ in policy.buffer] == [3, 4, 5, 6, 7]
    draws = [tuple(i for i, _ in policy.replay(step, 3)) for step in range(50)]
    assert all(len(set(draw)) == 3 for draw in draws)
    assert set().union(*draws) == {3, 4, 5, 6, 7}
    assert len(set(draws)) > 20
    assert draws[7] == tuple(i for i, _ in policy.replay(7, 3))
    assert len(policy.replay(0, 99)) == 5


def test_its_state_goes_through_json() -> None:
    policy, other = adaptive(share=0.3, capacity=3), adaptive(capacity=3)
    policy.observe(1.0)
    policy.add(responses(5))
    other.restore(json.loads(json.dumps(policy.state())))
    assert (other.share, other.loss, list(other.buffer)) == (0.3, 1.0, list(policy.buffer))
    assert other.buffer.maxlen == 3


def test_a_replay_is_of_other_prompts_than_the_steps_own() -> None:
    prompts = [Prompt(str(i), (i,), (i, 9), (), "") for i in range(1, 7)]
    written: list[int] = []

    def student(indices: Any, _period: int) -> list[tuple[Response]]:
        written.extend(indices)
        return [(Response((i + 1, 8, 9), Text.STUDENT),) for i in indices]

    batches = BatchSampler([2] * 6, batch_size=2, steps=300, seed=0)
    context = SourceContext(prompts, batches, 0, frozenset({9}), student=student)
    source = AdaptiveSource(AdaptiveConfig(share=1.0, capacity=2, fresh="increasing"), context)
    source.prepare()
    foreign = 0
    for step in range(3):  # the first fills the buffer, and hardly any later one is fresh
        texts, counts = source.next(step)
        assert counts["student_share"] == 1.0
        assert all(r.writer is Text.STUDENT and r.ids[0] == prompts[i].prompt_ids[0] for i, (r,) in texts)
        foreign += {i for i, _ in texts} != set(batches.window(step))
    assert written == batches.window(0)
    assert foreign == 2
