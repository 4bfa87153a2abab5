"""One step as others do it: the published script's shape, TRL, Liger, and plain dense code.

What the published DPKD script does is written here from its description: all rows padded, logits of every position of
both models, several copies of [B, T, V].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkd.data.batches import PLAIN, Batch, Layout, TokenSequence, collate
from dpkd.models.head import head_of, hidden_rows

__all__ = ["Padded", "backbones", "dense", "full_pairs", "liger", "padded", "released", "trl", "trl_chunked"]

Step = Callable[[], None]
Models = tuple[torch.nn.Module, torch.nn.Module]


class Padded(NamedTuple):
    """Input ids, attention mask, and a mask of the positions that predict a response token; all [B, T]."""

    ids: Tensor
    mask: Tensor
    response: Tensor


def padded(sequences: Sequence[TokenSequence], length: int, pad_id: int) -> Padded:
    """All rows at one length."""
    ids = torch.full((len(sequences), length), pad_id)
    mask, response = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (prompt, answer) in enumerate(sequences):
        whole = [*prompt, *answer][:length]
        ids[i, : len(whole)] = torch.tensor(whole)
        mask[i, : len(whole)] = 1
        response[i, max(len(prompt) - 1, 0) : len(whole) - 1] = 1
    return Padded(ids, mask, response)


def _collated(sequences: Sequence[TokenSequence], pad_id: int, models: Models, layout: Layout = PLAIN) -> Batch:
    return collate(sequences, pad_id=pad_id, layout=layout).to(next(models[0].parameters()).device)


def _logits(models: Models, batch: Padded) -> tuple[Tensor, Tensor]:
    """Of student and teacher, for every position."""
    student, teacher = models
    q = student(batch.ids, attention_mask=batch.mask).logits
    with torch.no_grad():
        p = teacher(batch.ids, attention_mask=batch.mask).logits
    return q, p


def _kl(p: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy to the teacher, in the way of the published scripts."""
    product = torch.masked_fill(
        F.softmax(p, -1, dtype=torch.float32) * F.log_softmax(q, -1, dtype=torch.float32), torch.isinf(q), 0
    )
    return -(product.sum(-1) * mask).sum() / mask.sum()


def _dpkd(p: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(q.bfloat16(), -1), F.log_softmax(p.bfloat16(), -1)
    a, b = log_p.argmax(-1, keepdim=True), log_q.argmax(-1, keepdim=True)
    gap = (log_q.gather(-1, a) - log_q.gather(-1, b)) - (log_p.gather(-1, a) - log_p.gather(-1, b))
    return -(F.logsigmoid(0.1 * gap.float()).squeeze(-1) * mask).sum() / mask.sum()


def released_loss(kind: str, models: Models, batch: Padded, corpus: Padded | None) -> Tensor:
    """`kl`, or `dpkd` (its token term in bfloat16); with a corpus also half of language modelling and KL on it."""
    q, p = _logits(models, batch)
    loss = _kl(p, q, batch.response) if kind == "kl" else _dpkd(p, q, batch.response)
    if corpus is None:
        return loss
    q, p = _logits(models, corpus)
    lm = F.cross_entropy(q[:, :-1].flatten(0, 1), corpus.ids[:, 1:].flatten())
    return loss + 0.5 * (0.5 * lm + 0.5 * _kl(p[:, :-1], q[:, :-1], corpus.response[:, :-1]))


def released(kind: str, models: Models, batch: Padded, corpus: Padded | None = None) -> Step:
    def step() -> None:
        models[0].zero_grad()
        released_loss(kind, models, batch, corpus).backward()

    return step


def full_pairs(models: Models, batch: Padded) -> Step:
    """DPKD over whole responses from full logits; y_t and y_s are neighbours."""
    targets = batch.ids.roll(-1, 1)

    def summed(logits: Tensor) -> Tensor:
        logs = F.log_softmax(logits.float(), -1)
        return (logs.gather(-1, targets.unsqueeze(-1)).squeeze(-1) * batch.response).sum(1)

    def step() -> None:
        models[0].zero_grad()
        with torch.no_grad():
            reference = summed(models[1](batch.ids, attention_mask=batch.mask).logits)
        ratio = summed(models[0](batch.ids, attention_mask=batch.mask).logits) - reference
        (-F.logsigmoid(0.1 * (ratio[0::2] - ratio[1::2])).mean()).backward()

    return step


def trl(models: Models, batch: Padded, beta: float) -> Step:
    """TRL's `GKDTrainer.generalized_jsd_loss` on full logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDTrainer
    labels = torch.where(batch.response.bool(), batch.ids, -100)

    def step() -> None:
        models[0].zero_grad()
        q, p = _logits(models, batch)
        GKDTrainer.generalized_jsd_loss(q, p, labels=labels, beta=beta).backward()

    return step


def trl_chunked(models: Models, batch: Padded, beta: float) -> Step:
    """TRL's chunked divergence over hidden states, as `DistillationTrainer` calls it off Triton: on every position."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def hidden(model: torch.nn.Module) -> Tensor:
        return model.base_model(batch.ids, attention_mask=batch.mask).last_hidden_state.flatten(0, 1)

    def step() -> None:
        student, teacher = models
        student.zero_grad()
        with torch.no_grad():
            of_teacher = hidden(teacher)
        q, p = (model.get_output_embeddings().weight for model in models)
        values, _ = ChunkedDivergenceFunction.apply(
            hidden(student), q, None, of_teacher, p, None, beta, 1.0, 1.0, None, 1.0, None
        )
        ((values * batch.response.flatten()).sum() / batch.response.sum()).backward()

    return step


def liger(models: Models, sequences: Sequence[TokenSequence], pad_id: int) -> Step:
    """Liger's chunked JSD without its compiler, on response positions. Raises ImportError where it does not run."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # imports Triton, which has no CPU build

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)
    batch = _collated(sequences, pad_id, models)

    def step() -> None:
        student, teacher = models
        student.zero_grad()
        with torch.no_grad():
            of_teacher = hidden_rows(teacher, batch)
        q, p = (model.get_output_embeddings().weight for model in models)
        loss(hidden_rows(student, batch), q, of_teacher, p, batch.targets).backward()

    return step


def dense_loss(kind: str, log_q: Tensor, log_p: Tensor) -> Tensor:
    """Values [N] of `fkl` or `jsd` from log-probs [N, V], as one would write them down."""
    if kind == "fkl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    mixed = torch.logaddexp(log_p, log_q) - 0.6931471805599453  # log 2
    return 0.5 * (log_p.exp() * (log_p - mixed) + log_q.exp() * (log_q - mixed)).sum(-1)


def dense(kind: str, models: Models, sequences: Sequence[TokenSequence], pad_id: int) -> Step:
    """The same loss on response positions, all at once: logits [N, V] of both models, plain autograd."""

    def step() -> None:
        student, teacher = models
        batch = _collated(sequences, pad_id, models)
        student.zero_grad()
        with torch.no_grad():
            log_p = F.log_softmax(head_of(teacher).logits(hidden_rows(teacher, batch)), -1)
        log_q = F.log_softmax(head_of(student).logits(hidden_rows(student, batch)), -1)
        dense_loss(kind, log_q, log_p).mean().backward()

    return step


def backbones(models: Models, sequences: Sequence[TokenSequence], pad_id: int, layout: Layout = PLAIN) -> Step:
    """No head and no loss: the floor."""
    batch = _collated(sequences, pad_id, models, layout)

    def step() -> None:
        student, teacher = models
        student.zero_grad()
        with torch.no_grad():
            hidden_rows(teacher, batch)
        hidden_rows(student, batch).sum().backward()

    return step
