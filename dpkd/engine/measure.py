"""What is logged for every loss, whatever it minimises: divergences, likelihoods, implicit rewards, lengths.

Implicit reward r̂ = β · log q(y|x) / p(y|x) (DPKD, §4.3), summed over a response; β is the loss's own, or 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpkd.api import Pair
from dpkd.engine.sums import Sums
from dpkd.functional import gather_logps, kl

__all__ = ["observe_pairs", "observe_rows"]


@torch.no_grad()
def observe_rows(
    log_q_nV: Tensor,
    log_p_nV: Tensor | None,
    targets_n: Tensor,
    sums: Sums,
    token_logps_2n: Tensor | None = None,
) -> None:
    """Add NLL, forward and reverse KL and top-1 agreement of some rows, from log-probs of student and teacher.

    `token_logps_2n` is a `[2, n]` view that receives the log-probs of the targets under student and teacher.
    """
    logp_q_n = gather_logps(log_q_nV, targets_n)
    sums.mean("nll/student", -logp_q_n)
    if token_logps_2n is not None:
        token_logps_2n[0] = logp_q_n
    if log_p_nV is None:
        return
    logp_p_n = gather_logps(log_p_nV, targets_n)
    sums.mean("nll/teacher", -logp_p_n)
    sums.mean("kl/forward", kl(log_p_nV, log_q_nV))
    sums.mean("kl/reverse", kl(log_q_nV, log_p_nV))
    sums.mean("agreement/top1", (log_q_nV.argmax(-1) == log_p_nV.argmax(-1)).float())
    if token_logps_2n is not None:
        token_logps_2n[1] = logp_p_n


@torch.no_grad()
def observe_pairs(student: Pair, teacher: Pair | None, lengths: Pair, scale: float, sums: Sums) -> None:
    """Add log-probs, implicit rewards, margin and accuracy of pairs `[B]`."""
    sums.mean("logp/preferred", student.preferred)
    sums.mean("logp/dispreferred", student.dispreferred)
    sums.mean("length/preferred", lengths.preferred)
    sums.mean("length/dispreferred", lengths.dispreferred)
    if teacher is None:
        return
    reward_t = scale * (student.preferred - teacher.preferred)
    reward_s = scale * (student.dispreferred - teacher.dispreferred)
    sums.mean("reward/preferred", reward_t)
    sums.mean("reward/dispreferred", reward_s)
    sums.mean("reward/margin", reward_t - reward_s)
    sums.mean("reward/accuracy", (reward_t > reward_s).float())
