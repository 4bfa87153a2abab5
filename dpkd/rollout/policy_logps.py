"""The policy's log-probs of drawn tokens, computed as a training step computes them.

What decodes rounds differently from what trains: other kernels, other batches, often a smaller type. A policy gradient
that takes the decoder's log-probs for the policy's is biased: rewards `log p - log q` and ratios `q / q_old` are off
by the rounding, token by token. So the policy's are computed again here, and those of the decoder stay what they are:
the log-probs of the policy that drew (`behaviour_logps`), for importance weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dpkd.api import Sampled
from dpkd.data.batches import Batch, TokenSequence, collate, micro_batches
from dpkd.models.chunked import chunk_rows, token_logps
from dpkd.models.head import evaluating, head_of, hidden_rows

# Tokens of a forward, padding included.
TOKENS = 16384
# Largest importance weight of a token for the rounding of what drew it (verl and TRL: 2).
LARGEST_WEIGHT = 2.0


def truncated(drawn: Sequence[Sampled]) -> list[Sampled]:
    """The responses with importance weights q/q_drawn of at most LARGEST_WEIGHT: truncated importance sampling.

    For plain sampling, where the two policies are one but for rounding. The log-prob of the policy that drew is raised
    to where the weight is that, so that no loss has to know of it.
    """
    floor = math.log(LARGEST_WEIGHT)
    return [replace(one, behaviour_logps=torch.maximum(one.behaviour_logps, one.logps - floor)) for one in drawn]


def token_scores(
    score: Callable[[Batch], Tensor], sequences: Sequence[TokenSequence], *, pad_id: int, device: torch.device
) -> list[Tensor]:
    """What `score` gives each response token of a batch, `[N]`: one tensor on the host for each sequence."""
    lengths = [len(s.prompt_ids) + len(s.response_ids) for s in sequences]
    found: list[Tensor] = [torch.empty(0)] * len(sequences)
    for group in micro_batches(lengths, len(lengths), TOKENS):
        batch = collate([sequences[i] for i in group], pad_id=pad_id).to(device)
        parts = score(batch).cpu().split([sequence.predicted for sequence in batch.sequences])
        for i, part in zip(group, parts, strict=True):
            found[i] = part
    return found


@dataclass(frozen=True)
class PolicyScorer:
    """Gives responses the log-probs of the policy that is trained: in the precision of `autocast`, without dropout."""

    vocabulary: int
    pad_id: int
    device: torch.device
    autocast: Callable[[], AbstractContextManager[object]]

    @torch.no_grad()
    def __call__(self, policy: nn.Module, prompts: Sequence[Sequence[int]], drawn: Sequence[Sampled]) -> list[Sampled]:
        """The responses, one to each prompt, with `logps` under the policy; their behaviour log-probs stay."""

        def score(batch: Batch) -> Tensor:
            head = head_of(policy, self.vocabulary)
            return token_logps(hidden_rows(policy, batch), head, batch.targets, chunk_rows(self.vocabulary, 32.0))

        sequences = [TokenSequence(tuple(p), one.response_ids) for p, one in zip(prompts, drawn, strict=True)]
        with evaluating(policy), self.autocast():
            logps = token_scores(score, sequences, pad_id=self.pad_id, device=self.device)
        return [replace(one, logps=part) for one, part in zip(drawn, logps, strict=True)]
