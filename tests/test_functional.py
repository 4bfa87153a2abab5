"""The pure functions against SciPy, loops and identities, at zeros and infinities too."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor
from torch.autograd import gradcheck

from dpkd import functional
from dpkd.functional import (
    aggregate,
    at_least_float32,
    cross_entropy,
    entropy,
    gather_logps,
    kl,
    log_mix,
    log_softmax,
    nll,
    preference,
    returns_to_go,
    segment_sum,
    sorted_distance,
)

INF = math.inf
WEIGHTS = [0.0, 0.1, 0.5, 1.0]


def _logits(rows: int, vocabulary: int, seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _log_p(rows: int, vocabulary: int, seed: int) -> Tensor:
    """Log-probabilities that SciPy, not the code under test, normalized."""
    return torch.from_numpy(special.log_softmax(_logits(rows, vocabulary, seed).numpy(), axis=-1))


def _logs(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def _grads(f: Callable[..., Tensor], *values: Tensor) -> list[Tensor]:
    leaves = [v.clone().requires_grad_() for v in values]
    return list(torch.autograd.grad(f(*leaves).sum(), leaves))


def test_every_public_function_is_documented() -> None:
    assert len(functional.__all__) == 23
    for name in functional.__all__:
        assert getattr(functional, name).__doc__, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32(dtype: torch.dtype) -> None:
    assert at_least_float32(torch.ones(2, dtype=dtype)).dtype is torch.float32
    assert log_softmax(torch.ones(1, 2, dtype=dtype)).dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_precise_numbers_stay_as_they_are(dtype: torch.dtype) -> None:
    values = torch.ones(2, dtype=dtype)
    assert at_least_float32(values) is values
    assert log_softmax(values[None]).dtype is dtype


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_log_softmax_equals_scipy(temperature: float) -> None:
    logits = _logits(4, 6, seed=1)
    expected = special.log_softmax(logits.numpy() / temperature, axis=-1)
    np.testing.assert_allclose(log_softmax(logits, temperature).numpy(), expected, atol=1e-12)
    assert gradcheck(lambda z: log_softmax(z, temperature), logits.requires_grad_())


def test_log_softmax_at_the_edges() -> None:
    """Excluded tokens stay excluded; logits in the ten thousands neither overflow nor lose their difference."""
    values = log_softmax(torch.tensor([[0.0, 0.0, -INF], [1e4, 1e4 + 1, -1e4]], dtype=torch.float64))
    assert values[0].tolist() == pytest.approx([-math.log(2), -math.log(2), -INF])
    assert values[1, :2].tolist() == pytest.approx([-math.log1p(math.e), -math.log1p(1 / math.e)])


def test_kl_equals_scipy_and_has_a_direction() -> None:
    log_p, log_q = _log_p(5, 7, seed=2), _log_p(5, 7, seed=3)
    p, q = log_p.exp().numpy(), log_q.exp().numpy()
    np.testing.assert_allclose(kl(log_p, log_q).numpy(), special.rel_entr(p, q).sum(-1), atol=1e-12)
    np.testing.assert_allclose(kl(log_q, log_p).numpy(), special.rel_entr(q, p).sum(-1), atol=1e-12)
    assert (kl(log_p, log_q) - kl(log_q, log_p)).abs().min() > 1e-3


def test_kl_by_hand() -> None:
    """p = ½ ½ 0, q = ¼ ½ ¼: Σ p log p/q = ½ log 2 + 0 + 0, and the other way round ¼ log ¼/0 = ∞."""
    p, q = _logs(0.5, 0.5, 0.0), _logs(0.25, 0.5, 0.25)
    assert kl(p, q).item() == pytest.approx(0.5 * math.log(2))
    assert kl(q, p).item() == INF
    assert kl(p, p).item() == 0


@pytest.mark.parametrize("seed", range(20))
def test_kl_is_non_negative_and_zero_only_at_match(seed: int) -> None:
    log_p, log_q = _log_p(3, 9, seed), _log_p(3, 9, seed + 100)
    assert kl(log_p, log_q).min() > 0
    assert kl(log_p, log_p).abs().max() == 0


def test_a_probability_that_underflows_counts_as_zero() -> None:
    """exp(-200) is 0 in float32: a token that q excludes costs nothing."""
    assert kl(torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, -INF]])).item() == 0


@pytest.mark.parametrize("f", [kl, cross_entropy])
def test_gradients_of_two_distributions(f: Callable[[Tensor, Tensor], Tensor]) -> None:
    log_p, log_q = _log_p(3, 4, seed=4), _log_p(3, 4, seed=5)
    assert gradcheck(f, (log_p.clone().requires_grad_(), log_q.clone().requires_grad_()))
    assert torch.allclose(_grads(f, log_p, log_q)[1], -log_p.exp())


@pytest.mark.parametrize("f", [kl, cross_entropy])
@pytest.mark.parametrize("q", [(0.25, 0.5, 0.25), (0.5, 0.5, 0.0)])
def test_zeros_of_p_give_finite_values_and_gradients(
    f: Callable[[Tensor, Tensor], Tensor], q: tuple[float, ...]
) -> None:
    log_p, log_q = _logs(0.5, 0.5, 0.0), _logs(*q)
    assert f(log_p, log_q).isfinite().all()
    for gradient in _grads(f, log_p, log_q):
        assert gradient.isfinite().all()
        assert gradient[0, 2] == 0


@pytest.mark.parametrize("f", [kl, cross_entropy])
def test_zeros_of_q_give_infinity_and_never_nan(f: Callable[[Tensor, Tensor], Tensor]) -> None:
    log_p, log_q = _logs(0.5, 0.25, 0.25), _logs(0.5, 0.5, 0.0)
    assert f(log_p, log_q).item() == INF
    assert not any(gradient.isnan().any() for gradient in _grads(f, log_p, log_q))


def test_entropy() -> None:
    log_p = _log_p(4, 6, seed=6)
    np.testing.assert_allclose(entropy(log_p).numpy(), stats.entropy(log_p.exp().numpy(), axis=-1), atol=1e-12)
    assert entropy(_logs(*[0.125] * 8)).item() == pytest.approx(3 * math.log(2))
    assert entropy(_logs(0.0, 1.0)).item() == 0
    assert _grads(entropy, _logs(0.5, 0.5, 0.0))[0].isfinite().all()
    assert gradcheck(entropy, log_p.requires_grad_())


def test_cross_entropy_is_kl_plus_entropy() -> None:
    """Of p ≠ q, so that an entropy of the wrong distribution is seen."""
    log_p, log_q = _log_p(5, 7, seed=7), _log_p(5, 7, seed=8)
    torch.testing.assert_close(cross_entropy(log_p, log_q), kl(log_p, log_q) + entropy(log_p))
    assert cross_entropy(_logs(0.5, 0.5, 0.0), _logs(0.25, 0.5, 0.25)).item() == pytest.approx(1.5 * math.log(2))


def test_gather_takes_one_token_per_row() -> None:
    log_q, ids = _log_p(3, 4, seed=9), [3, 0, 2]
    expected = [log_q[i, v].item() for i, v in enumerate(ids)]
    assert gather_logps(log_q, torch.tensor(ids)).tolist() == expected
    assert nll(log_q, torch.tensor(ids)).tolist() == [-e for e in expected]
    assert torch.equal(_grads(lambda z: nll(z, torch.tensor(ids)), log_q)[0], -torch.eye(4).double()[ids])


@pytest.mark.parametrize("weight", WEIGHTS)
def test_mixture_equals_numpy_and_is_a_distribution(weight: float) -> None:
    log_a, log_b = _log_p(3, 5, seed=10), _log_p(3, 5, seed=11)
    mixed = log_mix(log_a, log_b, weight)
    expected = weight * np.exp(log_a.numpy()) + (1 - weight) * np.exp(log_b.numpy())
    np.testing.assert_allclose(mixed.exp().numpy(), expected, atol=1e-12)
    assert mixed.exp().sum(-1).tolist() == pytest.approx([1] * 3)
    if 0 < weight < 1:
        assert gradcheck(lambda a, b: log_mix(a, b, weight), (log_a.requires_grad_(), log_b.requires_grad_()))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_mixture_with_excluded_tokens(weight: float) -> None:
    """Excluded by a, by b, by both: only the last stays impossible, and no gradient is NaN."""
    log_a, log_b = _logs(0.5, 0.0, 0.5, 0.0), _logs(0.5, 0.5, 0.0, 0.0)
    mixed = log_mix(log_a, log_b, weight)
    assert mixed.exp()[0].tolist() == pytest.approx([0.5, 0.5 * (1 - weight), 0.5 * weight, 0])
    assert mixed[0, 3].item() == -INF
    if 0 < weight < 1:
        for gradient in _grads(lambda a, b: log_mix(a, b, weight)[:, :3], log_a, log_b):
            assert gradient.isfinite().all()
        for gradient in _grads(lambda a, b: log_mix(a, b, weight).exp(), log_a, log_b):
            assert gradient.isfinite().all()


def test_mixture_with_a_weight_for_each_row() -> None:
    """As with the same number for the row alone, also where a token is excluded by one or by both."""
    log_a, log_b = _log_p(4, 5, seed=10), _log_p(4, 5, seed=11)
    log_a[:, 3:], log_b[:, 4:] = -INF, -INF
    weights = torch.tensor([[0.0], [0.25], [0.9], [1.0]], dtype=torch.float64)

    def each(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([log_mix(a[i : i + 1], b[i : i + 1], weights[i].item()) for i in range(4)])

    torch.testing.assert_close(log_mix(log_a, log_b, weights), each(log_a, log_b))
    found, expected = (
        _grads(lambda a, b, f=f: f(a, b).exp(), log_a, log_b) for f in (lambda a, b: log_mix(a, b, weights), each)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_mixture_keeps_what_exponentials_would_lose() -> None:
    """At -2000 nats both probabilities are 0 in floats: ¼ e^-2000 + ¾ e^-2001."""
    mixed = log_mix(torch.tensor([[-2000.0]]).double(), torch.tensor([[-2001.0]]).double(), 0.25)
    assert mixed.item() == pytest.approx(-2000 + math.log(0.25 + 0.75 / math.e))


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_a_mixture_weight_outside_the_unit_interval_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"lies in \[0, 1\], got"):
        log_mix(_logs(1.0), _logs(1.0), weight)


def test_aggregate() -> None:
    logps, lengths = torch.tensor([-6.0, -5.0]), torch.tensor([3.0, 2.0])
    assert aggregate(logps, lengths, "sum").tolist() == [-6, -5]
    assert aggregate(logps, lengths, "mean").tolist() == [-2, -2.5]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_preference_equals_numpy(smoothing: float) -> None:
    margin = np.array([-3.0, -0.1, 0.0, 0.7, 4.0])
    right, wrong = np.logaddexp(0, -margin), np.logaddexp(0, margin)
    values = preference(torch.from_numpy(margin), smoothing)
    np.testing.assert_allclose(values.numpy(), (1 - smoothing) * right + smoothing * wrong, atol=1e-12)
    slope = -(1 - smoothing) * special.expit(-margin) + smoothing * special.expit(margin)
    gradient = _grads(lambda m: preference(m, smoothing), torch.from_numpy(margin))[0]
    np.testing.assert_allclose(gradient.numpy(), slope, atol=1e-12)


def test_smoothing_bounds_the_margin_that_is_wanted() -> None:
    """With a share ε of wrong labels the value is least at log (1-ε)/ε."""
    best = torch.tensor([math.log(0.8 / 0.2)], dtype=torch.float64)
    assert _grads(lambda m: preference(m, 0.2), best)[0].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_preference_of_large_margins_is_linear_not_infinite(smoothing: float) -> None:
    values = preference(torch.tensor([-1e4, 1e4]), smoothing)
    assert values.tolist() == pytest.approx([(1 - smoothing) * 1e4, smoothing * 1e4])


def test_segment_sum_equals_loops() -> None:
    values, segment = _logits(7, 1, seed=12)[:, 0], [2, 0, 0, 4, 2, 2, 0]
    expected = [0.0] * 6
    for v, s in zip(values.tolist(), segment, strict=True):
        expected[s] += v
    assert segment_sum(values, torch.tensor(segment), 6).tolist() == pytest.approx(expected)
    weights = torch.arange(6, dtype=torch.float64)
    gradient = _grads(lambda v: segment_sum(v, torch.tensor(segment), 6) * weights, values)[0]
    assert gradient.tolist() == segment


@pytest.mark.parametrize("discount", [1.0, 0.9, 0.0])
def test_returns_equal_loops_and_stop_at_the_end_of_a_sequence(discount: float) -> None:
    lengths = [3, 1, 4]
    rewards, sequence = _logits(8, 1, seed=13)[:, 0], [i for i, n in enumerate(lengths) for _ in range(n)]
    expected = []
    for i in range(8):
        later = [j for j in range(i, 8) if sequence[j] == sequence[i]]
        expected.append(sum(discount ** (j - i) * rewards[j].item() for j in later))
    before = rewards.clone()
    assert returns_to_go(rewards, torch.tensor(sequence), discount).tolist() == pytest.approx(expected)
    assert torch.equal(rewards, before)


def test_returns_have_the_rewards_dtype_and_no_gradient() -> None:
    rewards = torch.ones(2, requires_grad=True)
    values = returns_to_go(rewards.detach(), torch.tensor([0, 0]))
    assert values.dtype is torch.float32
    assert not returns_to_go(rewards, torch.tensor([0, 0])).requires_grad


EMPTY_ROWS = torch.zeros(0, 3)
NO_IDS = torch.zeros(0, dtype=torch.long)


@pytest.mark.parametrize(
    "f",
    [
        log_softmax,
        entropy,
        lambda z: kl(z, z),
        lambda z: cross_entropy(z, z),
        lambda z: nll(z, NO_IDS),
        lambda z: log_mix(z, z, 0.5),
        lambda z: preference(z[:, 0], 0.1),
        lambda z: aggregate(z[:, 0], torch.ones(0), "mean"),
        lambda z: segment_sum(z[:, 0], NO_IDS, 2),
        lambda z: sorted_distance(z, z),
    ],
)
def test_no_rows_are_no_special_case(f: Callable[[Tensor], Tensor]) -> None:
    assert f(EMPTY_ROWS).sum().item() == 0
    assert _grads(f, EMPTY_ROWS)[0].shape == (0, 3)


@pytest.mark.parametrize(("tokens_p", "tokens_q"), [(9, 9), (3, 9), (9, 3), (0, 5), (0, 0)])
def test_sorted_distance_equals_two_whole_sorts(tokens_p: int, tokens_q: int) -> None:
    """Each side has mass on so many of 9 tokens; value and gradient."""
    p, q = _log_p(6, 9, 31).exp(), _log_p(6, 9, 32).exp()
    p[:, tokens_p:], q[:, : 9 - tokens_q] = 0, 0

    def whole(a: Tensor, b: Tensor) -> Tensor:
        return (a.sort(-1, descending=True).values - b.sort(-1, descending=True).values).abs().sum(-1)

    torch.testing.assert_close(sorted_distance(p, q), whole(p, q))
    for found, expected, mass in zip(_grads(sorted_distance, p, q), _grads(whole, p, q), (p, q), strict=True):
        torch.testing.assert_close(found[mass > 0], expected[mass > 0])  # at 0 the absolute value has a corner


def test_no_rewards_have_no_returns() -> None:
    assert returns_to_go(torch.zeros(0), NO_IDS).shape == (0,)


@pytest.mark.parametrize("free", [True, False], ids=["looks", "does not look"])
def test_autocast_changes_no_sum(free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who calls a loss inside a trainer's autocast gets float32 sums, not those of half precision."""
    monkeypatch.setattr(functional, "free_to_read", lambda device: free)
    torch.manual_seed(0)
    log_p, log_q = (torch.randn(3, 1000).log_softmax(-1) for _ in range(2))
    expected = kl(log_p, log_q), entropy(log_p)
    with torch.autocast("cpu", torch.bfloat16):
        found = kl(log_p, log_q), entropy(log_p)
    for own, want in zip(found, expected, strict=True):
        assert own.dtype == torch.float32
        assert torch.equal(own, want)
