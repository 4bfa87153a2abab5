"""The same numbers as TRL's code, where both have the objective; what TRL sums or averages is said at each."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from zoo_inputs import randn, token_inputs

from dpkd.api import LossSpec, Pair, PairInputs, Signal
from dpkd.plugins import load_registry

trl = pytest.importorskip("trl", reason="TRL is a development dependency")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
PAIRS, TOKENS = 6, 9


def loss_of(name: str, **settings: Any) -> Any:
    spec = load_registry().get(LossSpec, name).spec
    return spec.loss(spec.config(**settings))


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("name", "temperature"), [("jsd", 1.0), ("jsd", 2.0), ("gkd", 1.0)])
def test_generalised_jsd(name: str, beta: float, temperature: float) -> None:
    """TRL: mean over the tokens with a label ("batchmean"); here: one value per token. No T² factor in either."""
    from trl.experimental.gkd import GKDTrainer

    student, teacher = randn(2, 7, 11, seed=1), randn(2, 7, 11, seed=2)
    labels = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(3))
    labels[0, :3] = labels[1, 5:] = -100
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=beta, temperature=temperature)
    mask = labels != -100
    more = {} if temperature == 1.0 else {"temperature": temperature}
    ours = loss_of(name, beta=beta, **more)(token_inputs(student[mask], teacher[mask]))
    torch.testing.assert_close(ours.mean(), theirs.to(ours.dtype), rtol=1e-6, atol=1e-9)


@pytest.fixture(scope="module")
def drawn() -> SimpleNamespace:
    """Log-probs of the tokens of chosen and rejected responses under two models, and masks of unequal lengths."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(2, TOKENS, (2 * PAIRS,), generator=generator)
    mask = (torch.arange(TOKENS).unsqueeze(0) < lengths.unsqueeze(1)).long()
    policy, reference = (-3 * torch.rand(2 * PAIRS, TOKENS, generator=generator) * mask for _ in range(2))
    return SimpleNamespace(mask=mask, lengths=lengths, policy=policy, reference=reference)


def inputs(drawn: SimpleNamespace) -> PairInputs:
    """MeanMetrics over tokens; the reference of TRL is our teacher (dpkd-...) or our start of the student (dpo)."""
    student, reference = (Pair(*values.sum(1).chunk(2)) for values in (drawn.policy, drawn.reference))
    lengths = Pair(*drawn.lengths.float().chunk(2))
    return PairInputs(
        {
            Signal.STUDENT_LOGPS: student,
            Signal.TEACHER_LOGPS: reference,
            Signal.REFERENCE_LOGPS: reference,
            Signal.LENGTHS: lengths,
        }
    )


def dpo_trainer_loss(drawn: SimpleNamespace, loss_type: str, **settings: float) -> torch.Tensor:
    """TRL's own `DPOTrainer._compute_loss` on these log-probs, without a trainer: the mean over pairs."""
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = MagicMock()
    trainer.accelerator.device = "cpu"
    trainer.accelerator.gather_for_metrics = trainer.accelerator.gather = lambda value: value
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    plain = {
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "use_weighting": False,
        "f_divergence_type": "reverse_kl",
        "loss_types": [loss_type],
        "loss_weights": [1.0],
        "label_smoothing": 0.0,
        "beta": 0.1,
    }
    for name, value in (plain | settings).items():
        setattr(trainer, name, value)
    width = TOKENS + 1  # the first token has no prediction
    whole = torch.nn.functional.pad(drawn.mask, (1, 0))
    zeros = torch.zeros(2 * PAIRS, TOKENS)
    output = SimpleNamespace(log_probs=drawn.policy, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    reference = drawn.reference.sum(1).chunk(2)
    batch = {
        "input_ids": torch.zeros(2 * PAIRS, width, dtype=torch.long),
        "attention_mask": torch.ones_like(whole),
        "completion_mask": whole,
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    return DPOTrainer._compute_loss(trainer, lambda **more: output, batch, False)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "ours", "loss_type", "theirs"),
    [
        ("dpo", {"beta": 0.3}, "sigmoid", {"beta": 0.3}),
        ("dpo", {"beta": 0.3, "aggregation": "mean"}, "sigmoid_norm", {"beta": 0.3}),
        ("dpkd", {"beta": 0.3, "aggregation": "sum"}, "sigmoid", {"beta": 0.3}),
        ("dpkd", {"beta": 0.3, "aggregation": "mean"}, "sigmoid_norm", {"beta": 0.3}),
        ("dpkd-ipo", {"tau": 0.2, "aggregation": "mean"}, "ipo", {"beta": 0.2}),  # TRL: per token
        ("dpkd-hinge", {"beta": 0.3}, "hinge", {"beta": 0.3}),
        ("dpkd-robust", {"beta": 0.3}, "robust", {"beta": 0.3}),
        ("dpkd-exo", {"beta": 0.3}, "exo_pair", {"beta": 0.3}),
        ("dpkd-apo", {"beta": 0.3, "form": "zero"}, "apo_zero", {"beta": 0.3}),
        ("dpkd-apo", {"beta": 0.3, "form": "down"}, "apo_down", {"beta": 0.3}),
    ],
)
def test_preferences_with_a_reference(
    drawn: SimpleNamespace, name: str, ours: dict[str, Any], loss_type: str, theirs: dict[str, float]
) -> None:
    """TRL: mean over pairs; log-probs summed over tokens, but for `ipo` and `sigmoid_norm`: means."""
    fields = load_registry().get(LossSpec, name).spec.config.model_fields
    if "aggregation" in fields and "aggregation" not in ours:
        ours = {**ours, "aggregation": "sum"}
    noise = next((field for field in ("label_smoothing", "flipped") if field in fields), None)
    if loss_type in ("robust", "exo_pair"):
        assert noise is not None
        ours, theirs = {**ours, noise: 0.1}, {**theirs, "label_smoothing": 0.1}
    values = loss_of(name, **ours)(inputs(drawn))
    torch.testing.assert_close(values.mean(), dpo_trainer_loss(drawn, loss_type, **theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("dpkd-simpo", {"beta": 2.0, "gamma": 0.5}, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}),
        ("dpkd-cpo", {"beta": 0.2, "nll_weight": 0.0}, {"loss_type": "sigmoid", "beta": 0.2}),
    ],
)
def test_preferences_without_a_reference(
    drawn: SimpleNamespace, name: str, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """TRL's CPOTrainer.cpo_loss gets means over tokens for SimPO, sums for CPO; its γ is divided by β."""
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(alpha=0.0, label_smoothing=0.0, accelerator=SimpleNamespace(device="cpu"), **theirs)
    sums = drawn.policy.sum(1)
    logps = sums / drawn.lengths if name == "dpkd-simpo" else sums
    losses, *_ = CPOTrainer.cpo_loss(trainer, *logps.chunk(2))
    torch.testing.assert_close(loss_of(name, **ours)(inputs(drawn)), losses, rtol=1e-5, atol=1e-6)


def test_orpo(drawn: SimpleNamespace) -> None:
    """TRL's odds_ratio_loss is λ log σ of the log odds ratio of means over tokens; the NLL is added after."""
    from trl.experimental.orpo import ORPOTrainer

    means = drawn.policy.sum(1) / drawn.lengths
    trainer = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer, *means.chunk(2))
    values = loss_of("dpkd-orpo", odds_weight=0.1)(inputs(drawn))
    torch.testing.assert_close(values, -means.chunk(2)[0] - losses, rtol=1e-5, atol=1e-6)


def gold_of_trl(**settings: Any) -> Any:
    """TRL's ULDLoss for a student of 6 tokens and a teacher of 5, of which four are the same, in another order."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    config = MagicMock(uld_hybrid_matched_weight=None, uld_hybrid_unmatched_weight=None, beta=0.5)
    for name, value in settings.items():
        setattr(config, name, value)
    student = MagicMock(get_vocab=lambda: {"a": 0, "b": 1, "c": 2, "d": 3, "own": 4, "more": 5})
    teacher = MagicMock(get_vocab=lambda: {"b": 0, "a": 1, "d": 2, "c": 3, "other": 4})
    return ULDLoss(config, student, teacher, torch.device("cpu"))


@pytest.mark.parametrize("settings", [{}, {"beta": 0.2}, {"matched_weight": 0.3}])
def test_gold_with_its_hybrid_loss(settings: dict[str, float]) -> None:
    """TRL: the mean over the groups of a response. Merged vectors are given to both; TRL's own place for the first
    token's distribution, and its clamp of log-probs at log 1e-8, are not compared."""
    rest_q, rest_p = -randn(8, seed=21).abs(), -randn(8, seed=22).abs()
    student, teacher = randn(8, 6, seed=23), randn(8, 5, seed=24)
    weight = settings.get("matched_weight")
    theirs = gold_of_trl(
        beta=settings.get("beta", 0.5),
        uld_hybrid_matched_weight=weight,
        uld_hybrid_unmatched_weight=None if weight is None else 1 - weight,
    )._compute_hybrid_uld_loss(student.softmax(-1) * rest_q.exp()[:, None], teacher.softmax(-1) * rest_p.exp()[:, None])
    none = torch.full((8, 1), -torch.inf, dtype=torch.float64)
    union_q, union_p = (
        torch.cat([student, none], 1),
        torch.cat([teacher[:, [1, 0, 3, 2]], none, none, teacher[:, 4:]], 1),
    )
    given = token_inputs(union_q, union_p)._signals
    inputs = type(token_inputs(union_q))({**given, Signal.STUDENT_REST: rest_q, Signal.TEACHER_REST: rest_p})
    torch.testing.assert_close(loss_of("gold", **settings)(inputs).mean(), theirs, rtol=1e-5, atol=1e-7)


def test_uld_with_its_sorted_distance() -> None:
    """TRL's ULD of one response whose tokens are aligned one to one: mean over tokens, each with its next place."""
    trl_loss = gold_of_trl(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=False,
        uld_token_merge_strategy="bayesian",
        uld_use_hybrid_loss=False,
    )
    student, teacher = randn(1, 5, 6, seed=25), randn(1, 5, 8, seed=26)
    labels = torch.tensor([[-100, 1, 2, 3, 4]])
    theirs = trl_loss(student, teacher, labels, labels, labels.clamp(min=0), labels.clamp(min=0))
    union_q = torch.nn.functional.pad(student[0, :-1], (0, 2), value=-torch.inf)
    ours = loss_of("uld", ce_weight=0.0, uld_weight=1.0)(token_inputs(union_q, teacher[0, :-1]))
    torch.testing.assert_close(ours.mean(), theirs, rtol=1e-6, atol=1e-9)
