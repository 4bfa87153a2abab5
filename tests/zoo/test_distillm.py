"""`distillm`: the objectives of `skl` and `srkl`, and a card that says what is missing."""

from __future__ import annotations

import pytest
import torch
from dpkd_zoo.distillm import SPEC, DistiLLMConfig, DistiLLMLoss
from dpkd_zoo.skl import SKLConfig, SKLLoss
from dpkd_zoo.srkl import SRKLConfig, SRKLLoss
from oracles_token import distillm, reference
from token_helpers import gradient, value
from zoo_inputs import randn

from dpkd.api import Text
from dpkd.config.extras import own_text
from dpkd.plugins import load_registry
from dpkd.rollout.adaptive import AdaptiveConfig
from dpkd.rollout.mixed import MixedConfig
from dpkd.testing import check_loss


@pytest.mark.parametrize("settings", [{}, {"divergence": "srkl"}, {"skew": 0.3}, {"divergence": "srkl", "skew": 0}])
def test_conforms_and_equals_loops(settings: dict[str, float]) -> None:
    check_loss(SPEC, config=settings, reference=reference(distillm))


@pytest.mark.parametrize("skew", [0.0, 0.1, 0.4])
def test_is_skl_or_srkl(skew: float) -> None:
    student, teacher = randn(3, 5, seed=1), randn(3, 5, seed=2)
    for name, same in (("skl", SKLLoss(SKLConfig(skew=skew))), ("srkl", SRKLLoss(SRKLConfig(skew=skew)))):
        loss = DistiLLMLoss(DistiLLMConfig(divergence=name, skew=skew))
        torch.testing.assert_close(value(loss, student, teacher), value(same, student, teacher))
        torch.testing.assert_close(gradient(loss, student, teacher), gradient(same, student, teacher))


def test_its_text_is_a_fixed_mix_and_the_card_says_how_to_have_the_papers() -> None:
    assert "text.source=adaptive with dev.path" in SPEC.card.notes
    text = own_text(SPEC, {}, "text", load_registry())[1]
    assert text == MixedConfig(mix={Text.DATASET: 0.5, Text.STUDENT: 0.5}, refresh="per_epoch")


def test_the_adaptive_text_has_the_released_numbers() -> None:
    """arguments.py: init-threshold 0, loss-eps 0.1, capacity 1000, replay-ratio decreasing; finetune.py: + 0.1."""
    a = AdaptiveConfig()
    assert (a.share, a.rise, a.tolerance, a.capacity, a.fresh) == (0.0, 0.1, 0.1, 1000, "decreasing")
