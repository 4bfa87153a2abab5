"""Top-k, top-p and the draw against definitions written as loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpkd.text import filters


def nucleus(p: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """The tokens that stay, likeliest first until the share is reached."""
    order = sorted(range(len(p)), key=lambda token: -p[token])[: top_k or None]
    wanted = top_p * sum(p[token] for token in order)
    kept: set[int] = set()
    for token in order:
        if sum(p[k] for k in kept) >= wanted:
            break
        kept.add(token)
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 5, 29, 40])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_filters_against_brute_force(top_k: int, top_p: float) -> None:
    p = np.random.default_rng(3).dirichlet(np.full(29, 0.5), size=6)
    kept = filters.keep_likeliest(torch.from_numpy(p), top_k, top_p).numpy()
    for got, row in zip(kept, p, strict=True):
        want = nucleus(row, top_k, top_p)
        assert set(got.nonzero()[0].tolist()) == want
        assert all(got[token] == row[token] for token in want)


def test_ties_with_the_last_token_stay() -> None:
    p = torch.tensor([[0.2, 0.2, 0.4, 0.2]])
    assert torch.equal(filters.keep_likeliest(p, 2, 1.0), p)
    assert torch.equal(filters.keep_likeliest(p, 0, 0.5), p)
    assert filters.keep_likeliest(p, 0, 0.4).count_nonzero() == 1


def test_nucleus_beyond_the_first_look(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.rand(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = filters.keep_likeliest(p, 0, 0.8)
    monkeypatch.setattr(filters, "NUCLEUS_FIRST_LOOK", 4)
    assert torch.equal(filters.keep_likeliest(p, 0, 0.8), want)


def test_impossible_tokens_are_never_drawn() -> None:
    p = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).repeat(5, 1)
    edges = torch.tensor([0.0, 0.3, 0.299999, 1 - 2**-53, 1.0], dtype=torch.float64)
    ids, total = filters.inverse_cdf(p, edges)
    assert set(ids.tolist()) <= {1, 3}
    assert ids[-2:].tolist() == [3, 3]
    np.testing.assert_allclose(total, 1.0, rtol=1e-6)
