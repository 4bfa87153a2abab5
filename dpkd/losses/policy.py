"""Losses on responses that the student sampled: policy-gradient objectives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpkd.api import Rollout, RolloutInputs, Signal
from dpkd.data.batches import labeled_rows
from dpkd.errors import DpkdError
from dpkd.losses.base import Count, ZooLoss, about_tokens
from dpkd.losses.distillation import required
from dpkd.losses.outputs import CHUNK_MIB, output, spread, take, take_known
from dpkd.models.head import Head


class PolicyLoss(ZooLoss):
    """A surrogate per sampled token, from what was known when the token was drawn."""

    def advantages(
        self,
        *,
        labels: Tensor,
        rollout_logps: Tensor,
        teacher_logps: Tensor,
        behaviour_logps: Tensor | None = None,
        prompt: Tensor | None = None,
        prompts: Sequence[str] = (),
        responses: Sequence[str] = (),
        rewards: Tensor | None = None,
    ) -> Tensor:
        """What each sampled token is worth `[B, T]`, 0 where nothing was sampled; once per collection of responses.

        labels           `[B, T]`: the sampled tokens, -100 elsewhere
        rollout_logps    `[B, T]`, log-prob of each under the student that drew it (`losses.token_logps`)
        teacher_logps    `[B, T]`, under the teacher
        behaviour_logps  `[B, T]`, under what really drew it, where that was not the student alone (None)
        prompt           `[B]`, the number of the prompt of each response, where the loss compares those to one prompt
        prompts          text of the prompt of each response, and `responses` text of each: where the loss reads them
        rewards          `[B]`, the reward of each response, where the loss reads it

        Raises DpkdError when the loss reads rewards and there are none.
        """
        if Signal.REWARDS in self.reads and rewards is None:
            raise DpkdError(f"the loss {self.spec.name} reads rewards, which are not given: one for each response [B]")
        where = labeled_rows(labels)
        with torch.no_grad():
            drawn = Rollout(
                rollout_logps=take(rollout_logps, where.places),
                behaviour_logps=take(rollout_logps if behaviour_logps is None else behaviour_logps, where.places),
                teacher_logps=take(teacher_logps, where.places),
                sequence=where.places // labels.shape[1],
                prompt=prompt,
                prompts=tuple(prompts),
                responses=tuple(responses),
                rewards=rewards,
            )
            return spread(self.loss.advantages(drawn), where, labels)

    def forward(
        self,
        *,
        labels: Tensor,
        student_logits: Tensor,
        teacher_logits: Tensor | None = None,
        advantages: Tensor | None = None,
        rollout_logps: Tensor | None = None,
        behaviour_logps: Tensor | None = None,
        teacher_logps: Tensor | None = None,
        num_items_in_batch: Count | None = None,
    ) -> Tensor:
        """The surrogate, a scalar: its gradient counts, its value means little.

        labels              `[B, T]`: the sampled tokens, -100 elsewhere; not shifted
        student_logits      `[B, T, V]` of the student as it is now
        teacher_logits      `[B, T, V]`, where the loss reads them
        advantages          `[B, T]`, from the method of that name
        rollout_logps       `[B, T]`; `rollout_logps`, `behaviour_logps` and `teacher_logps` as in `advantages`
        num_items_in_batch  sampled tokens of the whole optimizer step; None: of these labels

        Raises DpkdError when what the loss reads is missing, or shapes do not fit.
        """
        where = labeled_rows(labels)
        student = output(labels, "student_logits", student_logits)
        teacher = output(labels, "teacher_logits", teacher_logits)
        known = _known(advantages, rollout_logps, behaviour_logps, teacher_logps)
        others = {**about_tokens(where, labels), **take_known(known, where.places)}
        return self._reduced(RolloutInputs, where, student, teacher, others, num_items_in_batch, CHUNK_MIB)

    def from_hidden(
        self,
        student_hidden: Tensor,
        student_head: Head | nn.Module,
        teacher_hidden: Tensor | None = None,
        teacher_head: Head | nn.Module | None = None,
        labels: Tensor | None = None,
        *,
        advantages: Tensor | None = None,
        rollout_logps: Tensor | None = None,
        behaviour_logps: Tensor | None = None,
        teacher_logps: Tensor | None = None,
        num_items_in_batch: Count | None = None,
        chunk_mib: float = CHUNK_MIB,
    ) -> Tensor:
        """The same without logits `[B, T, V]`: the output heads run on a few tokens at a time.

        student_hidden  last hidden states `[B, T, H]`, and `student_head` the model or its output layer
        teacher_hidden  the same of the teacher, with `teacher_head`; where the loss reads its logits
        labels          `[B, T]`; `labels`, `advantages`, `rollout_logps`, `behaviour_logps`, `teacher_logps` and
                        `num_items_in_batch` as in a call with logits
        chunk_mib       memory of one chunk of float32 logits

        The gradient is taken chunk by chunk, inside this call: call `backward` on the result once at most.
        """
        labels = required(labels)
        where = labeled_rows(labels)
        student = output(labels, "student_hidden", student_hidden, student_head, hidden=True)
        teacher = output(labels, "teacher_hidden", teacher_hidden, teacher_head, hidden=True)
        known = _known(advantages, rollout_logps, behaviour_logps, teacher_logps)
        others = {**about_tokens(where, labels), **take_known(known, where.places)}
        return self._reduced(RolloutInputs, where, student, teacher, others, num_items_in_batch, chunk_mib)


def _known(
    advantages: Tensor | None, rollout: Tensor | None, behaviour: Tensor | None, teacher: Tensor | None
) -> dict[Signal, Tensor | None]:
    """What was known about the tokens; where nothing else drew them, the student did."""
    return {
        Signal.ADVANTAGES: advantages,
        Signal.ROLLOUT_LOGPS: rollout,
        Signal.BEHAVIOUR_LOGPS: rollout if behaviour is None else behaviour,
        Signal.TEACHER_LOGPS: teacher,
    }
