"""The chunked head against the dense computation: values and gradients, over shapes, chunk sizes, rules and dtypes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpkd.functional import gather_logps, kl, log_softmax
from dpkd.models import head as heads
from dpkd.models.chunked import chunk_rows, chunks, objective, token_logps
from dpkd.models.head import Head, LogitRule

RULES = [LogitRule(), LogitRule(scale=0.5), LogitRule(softcap=3.0), LogitRule(scale=2.0, softcap=5.0)]


def make(rows, width, vocabulary, *, bias, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    hidden = normal(rows, width).requires_grad_()
    weight = normal(vocabulary, width).requires_grad_()
    offset = normal(vocabulary).requires_grad_() if bias else None
    teacher = torch.log_softmax(normal(rows, vocabulary), -1)
    targets = torch.randint(0, vocabulary, (rows,), generator=g)
    return hidden, weight, offset, teacher, targets, normal(rows).abs()


def leaves(hidden, weight, bias):
    return [hidden, weight] if bias is None else [hidden, weight, bias]


@given(rows=st.integers(0, 40), size=st.integers(1, 12), data=st.data())
def test_chunks_cover_the_rows_and_begin_where_they_may(rows, size, data):
    starts = sorted({0, *data.draw(st.lists(st.integers(0, max(0, rows - 1)), max_size=rows))})
    found = list(chunks(rows, size, starts))
    assert [row for s in found for row in range(s.start, s.stop)] == list(range(rows))
    assert {s.start for s in found} <= set(starts)
    longest = max((b - a for a, b in pairwise([*starts, rows])), default=0)
    assert all(0 < s.stop - s.start <= size + longest - 1 for s in found)
    if len(starts) == rows:
        assert found == list(chunks(rows, size))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    vocabulary=st.integers(2, 12),
    size=st.integers(1, 12),
    bias=st.booleans(),
    rule=st.sampled_from(RULES),
    cut=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_objective_equals_dense(rows, vocabulary, size, bias, rule, cut, seed):
    hidden, weight, offset, teacher, _, row_weights = make(rows, 5, vocabulary + cut, bias=bias, seed=seed)
    own = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)  # a parameter of the loss
    teacher = torch.log_softmax(teacher[:, :vocabulary], -1)

    def head():
        return Head(weight[:vocabulary], None if offset is None else offset[:vocabulary], rule)

    def row_values(logits, which):
        return kl(teacher[which], log_softmax(logits)) * own * row_weights[which]

    chunked = objective(lambda logits, which: row_values(logits, which).sum(), hidden, head(), size, [own])
    got = torch.autograd.grad(3.0 * chunked, [*leaves(hidden, weight, offset), own])
    dense = row_values(rule(head().raw(hidden)), slice(None)).sum()
    want = torch.autograd.grad(
        3.0 * dense, [*leaves(hidden, weight, offset), own], allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(chunked, dense, rtol=1e-10, atol=1e-12)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    vocabulary=st.integers(2, 12),
    size=st.integers(1, 12),
    bias=st.booleans(),
    rule=st.sampled_from(RULES),
    seed=st.integers(0, 1000),
)
def test_token_logps_equal_dense(rows, vocabulary, size, bias, rule, seed):
    hidden, weight, offset, _, targets, row_weights = make(rows, 5, vocabulary, bias=bias, seed=seed)
    head = Head(weight, offset, rule)
    seen = []
    got = token_logps(hidden, head, targets, size, lambda log_q, which: seen.append(log_q))
    want = torch.log_softmax(rule(head.raw(hidden)), -1)
    torch.testing.assert_close(got, want.gather(-1, targets[:, None])[:, 0], rtol=1e-10, atol=1e-12)
    assert not seen or torch.allclose(torch.cat(seen), want)
    grads = torch.autograd.grad((got * row_weights).sum(), leaves(hidden, weight, offset))
    dense = (want.gather(-1, targets[:, None])[:, 0] * row_weights).sum()
    for a, b in zip(grads, torch.autograd.grad(dense, leaves(hidden, weight, offset)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_float32_within_1e5_relative():
    hidden, weight, _, teacher, _, w = make(50, 16, 300, bias=False, seed=0, dtype=torch.float32)
    chunked = objective(
        lambda z, which: (kl(teacher[which], log_softmax(z)) * w[which]).sum(),
        hidden,
        Head(weight, None, LogitRule()),
        7,
    )
    got = torch.autograd.grad(chunked, [hidden, weight])
    h64, w64 = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    dense = (kl(teacher.double(), log_softmax(h64 @ w64.t())) * w.double()).sum()
    want = torch.autograd.grad(dense, [h64, w64])
    assert abs(chunked.item() - dense.item()) < 1e-5 * abs(dense.item())
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() < 1e-5 * b.norm()


def test_frozen_head_gets_no_gradient_but_hidden_does():
    hidden, weight, _, teacher, targets, _ = make(6, 5, 8, bias=False, seed=1)
    weight = weight.detach()
    for total in (
        objective(lambda z, w: kl(teacher[w], log_softmax(z)).sum(), hidden, Head(weight, None, LogitRule()), 4),
        token_logps(hidden, Head(weight, None, LogitRule()), targets, 4).sum(),
    ):
        (gradient,) = torch.autograd.grad(total, [hidden])
        assert gradient.abs().sum() > 0


def test_bf16_autocast_keeps_log_probs_in_float32():
    hidden, weight, _, _, targets, _ = make(20, 16, 50, bias=False, seed=2, dtype=torch.float32)
    head = Head(weight, None, LogitRule())
    with torch.autocast("cpu", torch.bfloat16):
        logps = token_logps(hidden, head, targets, 8)
        seen = []
        total = objective(lambda z, w: (seen.append(z.dtype), log_softmax(z)[:, 0].sum())[1], hidden, head, 8)
    assert logps.dtype == total.dtype == torch.float32
    assert set(seen) == {torch.float32}
    exact = torch.log_softmax(hidden @ weight.t(), -1).gather(-1, targets[:, None])[:, 0]
    assert (logps - exact).abs().max() < 0.2  # bf16 products, float32 log-softmax
    total.backward()
    assert weight.grad.dtype == torch.float32


def test_no_tensor_of_all_rows_times_vocabulary_is_made():
    rows, vocabulary, size = 64, 101, 8
    hidden, weight, _, _, targets, _ = make(rows, 4, vocabulary, bias=False, seed=3, dtype=torch.float32)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    head = Head(weight, None, LogitRule())
    with Watch():
        objective(lambda z, w: log_softmax(z)[:, 0].sum(), hidden, head, size).backward()
        token_logps(hidden, head, targets, size).sum().backward()
    assert max(largest) == max(size * vocabulary, weight.numel(), rows * 4)


@pytest.mark.parametrize(("rows", "size"), [(0, 4), (1, 4), (50, 8), (2047, 1024)])
def test_chunks_cover_all_rows_once(rows, size):
    covered = [i for s in chunks(rows, size) for i in range(s.start, s.stop)]
    assert covered == list(range(rows))
    assert all(s.stop - s.start <= size for s in chunks(rows, size))


def test_chunk_rows_suit_the_device_and_are_never_too_few():
    assert chunk_rows(256_000, 1.0) == 32
    assert chunk_rows(512, 32.0) == chunk_rows(512) == 16384
    assert chunk_rows(152_000, 32.0) == 55
    assert chunk_rows(152_000) == 128  # the gradient of a large head weighs more than caches do


@pytest.mark.parametrize(("vocabulary", "free_gib"), [(32_000, 80), (50_257, 80), (151_936, 140), (151_936, 2)])
def test_a_chunk_on_a_gpu_is_a_small_share_of_its_memory(vocabulary, free_gib, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gib * 2**30, 141 * 2**30))
    taken = 4 * vocabulary * chunk_rows(vocabulary, device="cuda") / 2**20
    assert 0.98 * min(128, 1024 * free_gib / 64) < taken <= 128 or chunk_rows(vocabulary, device="cuda") == 128
    assert taken * 10 < 1400  # what a loss adds to the backbones at Qwen's vocabulary, for less than TRL's peak in all


@pytest.mark.parametrize("bias", [False, True])
def test_an_odd_vocabulary_is_computed_as_a_gpu_wants_it(bias, monkeypatch):
    """The same values and gradients, from products with further rows of the head, which are zero."""

    def passes():
        torch.manual_seed(0)
        hidden, weight = torch.randn(11, 8), torch.randn(13, 8)
        leaves = [one.requires_grad_() for one in (hidden, weight, *([torch.randn(13)] if bias else []))]
        head = Head(leaves[1], leaves[2] if bias else None, LogitRule())
        targets, strides = torch.arange(11) % 13, []

        def chunk_loss(logits_nV, rows):
            return gather_logps(logits_nV.log_softmax(-1), targets[rows]).sum()

        def fused(raw_nV, rows):
            strides.append(raw_nV.stride(0))
            z = raw_nV.detach().float().requires_grad_()
            with torch.enable_grad():
                total = chunk_loss(z, rows)
            raw_nV.copy_(torch.autograd.grad(total, z)[0])
            return total.detach()

        found = []
        for run in (
            lambda: objective(chunk_loss, leaves[0], head, 4),
            lambda: objective(chunk_loss, leaves[0], head, 4, fused=fused),
            lambda: token_logps(leaves[0], head, targets, 4).sum(),
        ):
            value = run()
            found += [value.detach(), *torch.autograd.grad(value, leaves)]
        return found, strides

    expected, unaligned = passes()
    monkeypatch.setattr(heads, "ALIGNED_ON", ("cpu",))
    found, aligned = passes()
    assert {*unaligned} == {13}
    assert {*aligned} == {64}
    for own, want in zip(found, expected, strict=True):
        torch.testing.assert_close(own, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("taken", ["all", "none"])
def test_the_gradient_of_a_head_is_never_filled_first(taken):
    """Its products are written and added to; of a head that no chunk reaches it is zero, whatever memory holds."""
    hidden, weight, _, _, targets, _ = make(12, 4, 11, bias=False, seed=3, dtype=torch.float32)
    filled = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            if name in ("empty", "empty_like"):
                out.fill_(torch.nan)
            elif name in ("zeros", "zeros_like", "zero_", "fill_", "slice_backward") and out.shape == weight.shape:
                filled.append(name)
            return out

    def chunk_loss(logits, rows):
        return log_softmax(logits)[:, 0].sum() if taken == "all" else torch.zeros(())

    with Watch():
        head = Head(weight, None, LogitRule()).cut(len(weight))
        got = torch.autograd.grad(objective(chunk_loss, hidden, head, 5), weight, allow_unused=True)[0]
        of_logps = torch.autograd.grad(token_logps(hidden, head, targets, 5).sum(), weight)[0]
    assert filled == ([] if taken == "all" else ["zero_"])
    logps = log_softmax(hidden @ weight.T)
    want = torch.autograd.grad(logps[:, 0].sum(), weight)[0] if taken == "all" else torch.zeros_like(weight)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        of_logps, torch.autograd.grad(gather_logps(log_softmax(hidden @ weight.T), targets).sum(), weight)[0]
    )
