"""Top-k, top-p and the draw against definitions written as loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpkd.api import SamplingSettings
from dpkd.rollout import token_sampling as filters


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


def proposed_and_replaced(q: np.ndarray, p: np.ndarray, ranks: np.ndarray, k: int) -> np.ndarray:
    """The probability of each token, by cases: every proposal, and every replacement of it."""
    best = set(np.argsort(-ranks)[:k].tolist())
    chances = np.zeros(len(q))
    for proposal, chance in enumerate(q):
        if proposal in best:
            chances[proposal] += chance
        else:
            for token, replaced in enumerate(p):
                chances[token] += chance * replaced
    return chances


@pytest.mark.parametrize("veto", [1, 3, 7, 50])
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.6}, {"top_k": 4, "top_p": 0.9}])
def test_a_veto_is_a_proposal_and_its_replacement(veto: int, changes: dict[str, float]) -> None:
    """Frequencies over a grid of uniform numbers, and the log-prob that each token says it was drawn with."""
    settings, generator = SamplingSettings(**changes), torch.Generator().manual_seed(veto)
    z_q, z_p = (3 * torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(2))
    q, p = (
        filters.keep_likeliest((z / settings.temperature).softmax(-1)[None], settings.top_k, settings.top_p)[0]
        for z in (z_q, z_p)
    )
    want = proposed_and_replaced((q / q.sum()).numpy(), (p / p.sum()).numpy(), z_p.numpy(), veto)
    count = 40_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = filters.draw(z_q.expand(count, -1), grid, settings, teacher_logits_BV=z_p.expand(count, -1), veto=veto)
    found = torch.bincount(drawn.ids_B, minlength=7).numpy() / count
    np.testing.assert_allclose(found, want, atol=1 / count)
    np.testing.assert_allclose(drawn.behaviour_B.exp(), want[drawn.ids_B], atol=1e-9)
    np.testing.assert_allclose(drawn.logps_B, z_q.log_softmax(-1)[drawn.ids_B], atol=1e-12)


def test_a_greedy_veto_takes_the_teachers_likeliest_where_the_students_is_not_good_enough() -> None:
    student, teacher = torch.tensor([[0.0, 5.0, 1.0]]), torch.tensor([[3.0, 1.0, 2.0]])
    for veto, token in ((1, 0), (2, 0), (3, 1)):
        drawn = filters.draw(
            student, torch.zeros(1), SamplingSettings(temperature=0.0), teacher_logits_BV=teacher, veto=veto
        )
        assert (drawn.ids_B.item(), drawn.behaviour_B.item()) == (token, 0.0)


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 1000])
def test_a_draw_is_the_first_token_whose_cumulated_probability_passes(vocabulary: int) -> None:
    """Against a cumulated sum in NumPy; a third of the tokens, and whole blocks of them, are impossible."""
    generator = torch.Generator().manual_seed(vocabulary)
    p = torch.rand(50, vocabulary, generator=generator) ** 4
    p[:, 1::3], p[:, 260:700] = 0.0, 0.0
    u = torch.rand(50, generator=generator, dtype=torch.float64)
    u[:2] = torch.tensor([0.0, 1 - 2**-53])
    ids, total = filters.inverse_cdf(p, u)
    cumulated = np.cumsum(p.numpy().astype(np.float64), -1)
    want = [np.searchsorted(row, x * row[-1], side="right") for row, x in zip(cumulated, u.numpy(), strict=True)]
    np.testing.assert_array_equal(ids, np.minimum(want, p.shape[1] - 1 - (p.flip(-1) > 0).int().argmax(-1).numpy()))
    np.testing.assert_allclose(total, cumulated[:, -1], rtol=1e-14)


def test_impossible_tokens_are_never_drawn() -> None:
    p = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).repeat(5, 1)
    edges = torch.tensor([0.0, 0.3, 0.299999, 1 - 2**-53, 1.0], dtype=torch.float64)
    ids, total = filters.inverse_cdf(p, edges)
    assert set(ids.tolist()) <= {1, 3}
    assert ids[-2:].tolist() == [3, 3]
    np.testing.assert_allclose(total, 1.0, rtol=1e-6)
