"""Losses on pairs: a chosen and a rejected response to each prompt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dpkd.api import Pair, PairInputs, Signal
from dpkd.functional import reduce_loss
from dpkd.losses.base import Count, ZooLoss
from dpkd.losses.distillation import required
from dpkd.losses.outputs import CHUNK_MIB, Output, logps_of_pairs, output
from dpkd.models.head import Head


class PreferenceLoss(ZooLoss):
    """A loss per pair, from the log-probs of whole responses."""

    def forward(
        self,
        *,
        student_logps: Sequence[Tensor],
        teacher_logps: Sequence[Tensor] | None = None,
        reference_logps: Sequence[Tensor] | None = None,
        lengths: Sequence[Tensor] | None = None,
        student_token_logps: Sequence[Tensor] | None = None,
        teacher_token_logps: Sequence[Tensor] | None = None,
        reference_token_logps: Sequence[Tensor] | None = None,
        num_items_in_batch: Count | None = None,
    ) -> Tensor:
        """The loss, a scalar per pair.

        student_logps       `(chosen, rejected)`, each `[P]`: log-probs in nats, summed over the tokens of a response
        teacher_logps       the same under the teacher; no gradient goes there
        reference_logps     under the student as it was at the start
        lengths             tokens of the responses, EOS included
        student_token_logps  `(chosen, rejected)`, each `[P, T]`: log-probs of the tokens from the first on, 0 behind
                            the last, where the loss reads them; `teacher_token_logps` and `reference_token_logps`
                            likewise
        num_items_in_batch  pairs of the whole optimizer step (the Trainer's argument of that name counts tokens);
                            None: P

        Raises DpkdError when what the loss reads is missing.
        """
        given = {
            Signal.TEACHER_LOGPS: teacher_logps,
            Signal.TEACHER_TOKEN_LOGPS: teacher_token_logps,
            Signal.REFERENCE_LOGPS: reference_logps,
            Signal.REFERENCE_TOKEN_LOGPS: reference_token_logps,
            Signal.LENGTHS: lengths,
        }
        signals = {signal: Pair(*(v.detach() for v in pair)) for signal, pair in given.items() if pair is not None}
        student = signals[Signal.STUDENT_LOGPS] = Pair(*student_logps)
        if student_token_logps is not None:
            signals[Signal.STUDENT_TOKEN_LOGPS] = Pair(*student_token_logps)
        values_P = self._values(PairInputs, signals, student.chosen.device)
        return reduce_loss(values_P, len(student.chosen) if num_items_in_batch is None else num_items_in_batch)

    def from_logits(
        self,
        *,
        student_logits: Tensor,
        labels: Tensor,
        teacher_logits: Tensor | None = None,
        reference_logits: Tensor | None = None,
        num_items_in_batch: Count | None = None,
    ) -> Tensor:
        """The loss of a batch whose first half are the chosen responses, and whose second half the rejected ones.

        student_logits      `[2P, T, V]`, with gradient
        labels              `[2P, T]`, -100 where a token is not trained; not shifted
        teacher_logits      `[2P, T, V]`; `teacher_logits` and `reference_logits` where the loss reads these models
        num_items_in_batch  pairs of the whole optimizer step; None: P

        Raises DpkdError when what the loss reads is missing, or shapes do not fit.
        """
        given = {"student": student_logits, "teacher": teacher_logits, "reference": reference_logits}
        outputs = {who: output(labels, f"{who}_logits", logits) for who, logits in given.items()}
        return self._from_outputs(outputs, labels, num_items_in_batch, CHUNK_MIB)

    def from_hidden(
        self,
        student_hidden: Tensor,
        student_head: Head | nn.Module,
        teacher_hidden: Tensor | None = None,
        teacher_head: Head | nn.Module | None = None,
        labels: Tensor | None = None,
        *,
        reference_hidden: Tensor | None = None,
        reference_head: Head | nn.Module | None = None,
        num_items_in_batch: Count | None = None,
        chunk_mib: float = CHUNK_MIB,
    ) -> Tensor:
        """The same without logits `[2P, T, V]`: the output heads run on a few tokens at a time.

        student_hidden    last hidden states `[2P, T, H]`, and `student_head` the model or its output layer
        teacher_hidden    the same of the teacher, with `teacher_head`
        reference_hidden  the same of the student as it was at the start, with `reference_head`
        labels            `[2P, T]`; `labels` and `num_items_in_batch` as in `from_logits`
        chunk_mib         memory of one chunk of float32 logits

        The gradient is taken chunk by chunk, inside this call: call `backward` on the result once at most.
        """
        labels = required(labels)
        given = {
            "student": (student_hidden, student_head),
            "teacher": (teacher_hidden, teacher_head),
            "reference": (reference_hidden, reference_head),
        }
        outputs = {who: output(labels, f"{who}_hidden", *given[who], hidden=True) for who in given}
        return self._from_outputs(outputs, labels, num_items_in_batch, chunk_mib)

    def _from_outputs(
        self, outputs: dict[str, Output | None], labels: Tensor, count: Count | None, chunk_mib: float
    ) -> Tensor:
        """The loss of what each of student, teacher and reference gives for the batch."""
        known = {who: one for who, one in outputs.items() if one is not None}
        size = self._size(known["student"].vocabulary, known["teacher"].vocabulary if "teacher" in known else None)
        found = {who: logps_of_pairs(one, labels, size, chunk_mib) for who, one in known.items()}
        logps = {f"{who}_logps": sums for who, (sums, _, _) in found.items()}
        logps |= {f"{who}_token_logps": tokens for who, (_, _, tokens) in found.items()}
        loss: Tensor = self(**logps, lengths=found["student"][1], num_items_in_batch=count)
        return loss
