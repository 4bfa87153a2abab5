"""One token per row from logits: temperature, the teacher's part, top-k, top-p, and the draw itself.

Pure functions. Shapes: B rows, V vocabulary. Log-probabilities are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkd.api import SamplingSettings
from dpkd.functional import at_least_float32

# Most nuclei lie among this many tokens; the whole vocabulary is sorted only where one does not.
NUCLEUS_FIRST_LOOK = 1024
BLOCK = 256  # tokens whose probabilities are summed before one of them is looked for


@dataclass(frozen=True)
class Drawn:
    """A token for each row `[B]`.

    ids        the token
    logps      log q under the student at temperature 1, before any filter
    behaviour  log-prob under the policy that drew it
    """

    ids_B: Tensor
    logps_B: Tensor
    behaviour_B: Tensor


def precise_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def draw(
    logits_BV: Tensor,
    uniforms_B: Tensor,
    settings: SamplingSettings,
    *,
    teacher_logits_BV: Tensor | None = None,
    mix: float = 0.0,
    veto: int = 0,
    static: bool = False,
) -> Drawn:
    """Draw one token per row from the filtered mixture `mix · teacher + (1 - mix) · student`.

    Both distributions have the temperature of `settings`; then come top-k and top-p. At temperature 0 the
    likeliest token of the mixture at temperature 1 is taken, with behaviour log-prob 0. Teacher-mixed
    sampling: MiniLLM, arXiv:2306.08543, section 2.2.

    With a `veto` the student proposes, and the teacher draws in its place where the proposal is not among its `veto`
    likeliest tokens: both filtered, each by itself (Speculative KD, arXiv:2410.11325, Algorithm 1).

    With `static` the host looks at no value on the way, as a CUDA graph needs it: a nucleus costs a full sort.
    """
    logits_BV = at_least_float32(logits_BV)
    if veto > 0 and teacher_logits_BV is not None:
        return _draw_with_veto(logits_BV, at_least_float32(teacher_logits_BV), uniforms_B, settings, veto, static)
    greedy = settings.temperature == 0.0
    scores_BV = logits_BV
    if teacher_logits_BV is not None or not greedy:
        scores_BV = _mixture(logits_BV, teacher_logits_BV, mix, 1.0 if greedy else settings.temperature)
    if greedy:
        ids_B = scores_BV.argmax(-1)
        logps_B = _logps(logits_BV, ids_B)
        return Drawn(ids_B, logps_B, torch.zeros_like(logps_B))
    filtered = settings.top_k > 0 or settings.top_p < 1.0
    p_BV = keep_likeliest(scores_BV, settings.top_k, settings.top_p, static) if filtered else scores_BV
    ids_B, total_B = inverse_cdf(p_BV, uniforms_B)
    logps_B = _logps(logits_BV, ids_B)
    if settings.temperature == 1.0 and not filtered and teacher_logits_BV is None:
        return Drawn(ids_B, logps_B, logps_B)  # one policy: the same number, not nearly the same
    return Drawn(ids_B, logps_B, _log_share(p_BV, ids_B, total_B))


def _log_share(p_BV: Tensor, ids_B: Tensor, total_B: Tensor) -> Tensor:
    drawn_B = p_BV.gather(-1, ids_B.unsqueeze(-1)).squeeze(-1).to(total_B.dtype)
    return drawn_B.log() - total_B.log()


def _draw_with_veto(
    logits_BV: Tensor,
    teacher_logits_BV: Tensor,
    uniforms_B: Tensor,
    settings: SamplingSettings,
    veto: int,
    static: bool,
) -> Drawn:
    """Proposal and replacement in one draw: their joint policy has a closed form."""
    allowed_BV = _among_likeliest(teacher_logits_BV, veto)
    if settings.temperature == 0.0:
        ids_B, theirs_B = logits_BV.argmax(-1), teacher_logits_BV.argmax(-1)
        ids_B = torch.where(allowed_BV.gather(-1, ids_B.unsqueeze(-1)).squeeze(-1), ids_B, theirs_B)
        logps_B = _logps(logits_BV, ids_B)
        return Drawn(ids_B, logps_B, torch.zeros_like(logps_B))
    q_BV, p_BV = (_filtered(z_BV, settings, static) for z_BV in (logits_BV, teacher_logits_BV))
    kept_BV = q_BV.masked_fill(~allowed_BV, 0.0)
    vetoed_B1 = q_BV.masked_fill(allowed_BV, 0.0).sum(-1, keepdim=True)
    policy_BV = kept_BV + vetoed_B1 * p_BV
    ids_B, total_B = inverse_cdf(policy_BV, uniforms_B)
    return Drawn(ids_B, _logps(logits_BV, ids_B), _log_share(policy_BV, ids_B, total_B))


def _among_likeliest(logits_BV: Tensor, k: int) -> Tensor:
    """Whether a token is among the k likeliest, ties with the last included, `[B, V]`."""
    if k >= logits_BV.shape[-1]:
        return torch.ones_like(logits_BV, dtype=torch.bool)
    return logits_BV >= logits_BV.topk(k, dim=-1).values[:, -1:]


def _filtered(logits_BV: Tensor, settings: SamplingSettings, static: bool) -> Tensor:
    """Probabilities `[B, V]` after temperature, top-k and top-p, summing to 1."""
    p_BV = keep_likeliest(_softmax(logits_BV, settings.temperature), settings.top_k, settings.top_p, static)
    return p_BV / p_BV.sum(-1, keepdim=True)


def _mixture(logits_BV: Tensor, teacher_logits_BV: Tensor | None, mix: float, temperature: float) -> Tensor:
    """Probabilities `[B, V]` of the policy before top-k and top-p."""
    q_BV = _softmax(logits_BV, temperature)
    if teacher_logits_BV is None:
        return q_BV
    p_BV = _softmax(at_least_float32(teacher_logits_BV), temperature)
    return p_BV * mix + q_BV * (1 - mix)


def _softmax(logits_BV: Tensor, temperature: float) -> Tensor:
    return (logits_BV if temperature == 1.0 else logits_BV / temperature).softmax(-1)


def _logps(logits_BV: Tensor, ids_B: Tensor) -> Tensor:
    """log q `[B]` of one token per row; the log-softmax is needed at one token only."""
    return logits_BV.gather(-1, ids_B.unsqueeze(-1)).squeeze(-1) - logits_BV.logsumexp(-1)


def keep_likeliest(p_BV: Tensor, top_k: int, top_p: float, static: bool = False) -> Tensor:
    """Probabilities `[B, V]`, not renormalised: of the top_k likeliest, the smallest set with share top_p.

    Tokens as likely as the last one kept stay too, so the result does not depend on the order of ties.

    >>> keep_likeliest(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), 3, 0.75)   # 0.4 / 0.9 < 0.75 <= 0.7 / 0.9
    tensor([[0.0000, 0.0000, 0.3000, 0.4000]])
    """
    if 0 < top_k < p_BV.shape[-1]:
        cutoff_B1 = p_BV.topk(top_k, dim=-1).values[:, -1:]
        p_BV = p_BV.masked_fill(p_BV < cutoff_B1, 0.0)
    if top_p < 1.0:
        p_BV = p_BV.masked_fill(p_BV < _nucleus_cutoff(p_BV, top_k, top_p, static), 0.0)
    return p_BV


def _nucleus_cutoff(p_BV: Tensor, top_k: int, top_p: float, static: bool) -> Tensor:
    """The smallest probability `[B, 1]` in the nucleus."""
    vocabulary = p_BV.shape[-1]
    wanted_B1 = top_p * p_BV.sum(-1, keepdim=True, dtype=precise_dtype(p_BV.device))
    first_look = top_k or (vocabulary if static else NUCLEUS_FIRST_LOOK)
    for count in (min(first_look, vocabulary), vocabulary):
        # A sort as such: for all tokens topk is one too, and not on every device one that a graph can hold.
        whole = static and count == vocabulary
        likeliest_BK = (p_BV.sort(-1, descending=True) if whole else p_BV.topk(count, dim=-1)).values
        mass_BK = likeliest_BK.cumsum(-1, dtype=precise_dtype(p_BV.device))
        if count == vocabulary or top_k or bool((mass_BK[:, -1:] >= wanted_B1).all()):
            break
    # A token belongs to the nucleus when the likelier ones do not reach the mass.
    inside_BK = mass_BK - likeliest_BK < wanted_B1
    last_B1 = inside_BK.sum(-1, keepdim=True).clamp(min=1) - 1
    return likeliest_BK.gather(-1, last_B1)


def inverse_cdf(p_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """The token `[B]` at which the cumulated probability passes `u · total`, and the total `[B]` in float64.

    Probabilities need not sum to 1; a token of probability 0 is never drawn, for any u in [0, 1).

    >>> inverse_cdf(torch.tensor([[0.0, 1.0, 3.0, 0.0]]), torch.tensor([0.25], dtype=torch.float64))
    (tensor([2]), tensor([4.], dtype=torch.float64))
    """
    vocabulary, dtype = p_BV.shape[-1], precise_dtype(p_BV.device)
    # A block of tokens first, then a token of it: one cumulated sum of the whole vocabulary is slow on a GPU.
    p_BnK = F.pad(p_BV, (0, -vocabulary % BLOCK)).unflatten(-1, (-1, BLOCK))
    cumulated_Bn = p_BnK.sum(-1, dtype=dtype).cumsum(-1)
    total_B1 = cumulated_Bn[:, -1:]
    block_B1, rest_B1 = _passed(cumulated_Bn, uniforms_B.unsqueeze(-1) * total_B1)
    p_BK = p_BnK.gather(1, block_B1.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1)
    place_B1, _ = _passed(p_BK.cumsum(-1, dtype=dtype), rest_B1)
    # Not-a-number logits pass no bound: the caller finds them in the log-probs, an id must exist until then.
    ids_B1 = (block_B1 * BLOCK + place_B1).clamp(max=vocabulary - 1)
    return ids_B1.squeeze(-1), total_B1.squeeze(-1)


def _passed(cumulated_BK: Tensor, target_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The first place `[B, 1]` whose cumulated value passes a target, and by how much the places before it do not."""
    total_B1 = cumulated_BK[:, -1:]
    # Rounding may take a target to the total, which no place passes.
    target_B1 = torch.minimum(target_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    place_B1 = torch.searchsorted(cumulated_BK, target_B1, right=True).clamp(max=cumulated_BK.shape[-1] - 1)
    return place_B1, target_B1 - F.pad(cumulated_BK, (1, 0)).gather(-1, place_B1)
