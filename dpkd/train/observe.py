"""What is logged for every loss, whatever it minimises: divergences, likelihoods, implicit rewards, lengths.

Implicit reward r̂ = β · log q(y|x) / p(y|x) (DPKD, §4.3), summed over a response; β is the loss's own, or 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpkd.api import Pair
from dpkd.cross_tokenizer.retokenize import AlignedBatch
from dpkd.functional import gather_logps, kl
from dpkd.train.mean_metrics import MeanMetrics


@torch.no_grad()
def observe_rows(
    log_q_nV: Tensor,
    log_p_nV: Tensor | None,
    targets_n: Tensor,
    metrics: MeanMetrics,
    token_logps_2n: Tensor | None = None,
) -> None:
    """Add NLL, forward and reverse KL and top-1 agreement of some rows, from log-probs of student and teacher.

    `token_logps_2n` is a `[2, n]` view that receives the log-probs of the targets under student and teacher.
    """
    logp_q_n = gather_logps(log_q_nV, targets_n)
    metrics.mean("nll/student", -logp_q_n)
    if token_logps_2n is not None:
        token_logps_2n[0] = logp_q_n
    if log_p_nV is None:
        return
    logp_p_n = gather_logps(log_p_nV, targets_n)
    metrics.mean("nll/teacher", -logp_p_n)
    metrics.mean("kl/forward", kl(log_p_nV, log_q_nV))
    metrics.mean("kl/reverse", kl(log_q_nV, log_p_nV))
    metrics.mean("agreement/top1", (log_q_nV.argmax(-1) == log_p_nV.argmax(-1)).float())
    if token_logps_2n is not None:
        token_logps_2n[1] = logp_p_n


@torch.no_grad()
def observe_pairs(student: Pair, teacher: Pair | None, lengths: Pair, scale: float, metrics: MeanMetrics) -> None:
    """Add log-probs, implicit rewards, margin and accuracy of pairs `[B]`."""
    metrics.mean("logp/chosen", student.chosen)
    metrics.mean("logp/rejected", student.rejected)
    metrics.mean("length/chosen", lengths.chosen)
    metrics.mean("length/rejected", lengths.rejected)
    if teacher is None:
        return
    reward_t = scale * (student.chosen - teacher.chosen)
    reward_s = scale * (student.rejected - teacher.rejected)
    metrics.mean("reward/chosen", reward_t)
    metrics.mean("reward/rejected", reward_s)
    metrics.mean("reward/margin", reward_t - reward_s)
    metrics.mean("reward/accuracy", (reward_t > reward_s).float())


def observe_spans(aligned: AlignedBatch, tokens: int, metrics: MeanMetrics) -> None:
    """Add the share of the student's tokens that lie in spans, and of spans that are one token to both models."""
    spans = len(aligned.student.first)
    metrics.add("spans/covered", float(spans + len(aligned.student.rest)), float(tokens))
    several = set(aligned.student.span.tolist()) | set(aligned.teacher.span.tolist())
    metrics.add("spans/single", float(spans - len(several)), float(spans))
