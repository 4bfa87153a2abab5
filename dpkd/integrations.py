"""The zoo in the trainers of transformers and TRL.

    from dpkd.integrations import DistillationTrainer

    DistillationTrainer(model, args, loss="akl", teacher="Qwen/Qwen2.5-7B-Instruct", train_dataset=tokenized).train()

For a trainer that derives from transformers' `Trainer`, such as TRL's `SFTTrainer`, mix it in:

    class DistillationSFTTrainer(DistillationMixin, SFTTrainer): ...
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer

from dpkd import losses
from dpkd.api import HIDDEN, LossSpec, TeacherAccess
from dpkd.errors import DpkdError
from dpkd.losses.base import ZooLoss
from dpkd.losses.distillation import DistillationLoss

__all__ = ["DistillationMixin", "DistillationTrainer"]


class DistillationMixin:
    """Makes a trainer minimize a loss of the zoo on its labels, in place of the cross-entropy."""

    def __init__(
        self,
        *args: Any,
        loss: str | LossSpec = "kd",
        teacher: str | nn.Module | None = None,
        loss_settings: Mapping[str, Any] | None = None,
        vocabulary: int | None = None,
        chunked: bool = False,
        **kwargs: Any,
    ) -> None:
        """Positional (`args`) and keyword (`kwargs`) arguments of the trainer, and these:

        loss           the name of a loss on tokens (`dpkd.losses.available()`), or the spec of one of your own
        teacher        a causal language model of transformers, or its name; None for a loss that reads no teacher
        loss_settings  settings of the loss
        vocabulary     compare the first so many ids only; None: all, or the tokenizer's where the models differ in size
        chunked        make logits a few tokens at a time: less memory. Not where the student's weights are sharded
                       (FSDP, ZeRO stage 3)

        Raises DpkdError for a loss that needs more than labels, and when the teacher is missing.
        """
        super().__init__(*args, **kwargs)
        trainer: Any = self
        trainer.model_accepts_loss_kwargs = True  # has the trainer count the tokens of all accumulated batches
        student = trainer.accelerator.unwrap_model(trainer.model)
        if isinstance(teacher, str):
            teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype=student.dtype)
        if teacher is not None:
            teacher = teacher.to(trainer.accelerator.device).eval().requires_grad_(False)
            vocabulary = vocabulary or _shared_ids(student, teacher, getattr(trainer, "processing_class", None))
        self.distillation_loss = _checked(
            losses.get(loss, vocabulary=vocabulary, **(loss_settings or {})), has_teacher=teacher is not None
        )
        self.teacher, self.chunked = teacher, chunked

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of the zoo on a batch, divided by the labeled tokens of the whole optimizer step.

        model               the student as the trainer has it (wrapped in DDP, say)
        inputs              what the model is called with, and `labels`
        return_outputs      return the student's outputs too
        num_items_in_batch  labeled tokens of all accumulated batches, which the trainer counts; None: of this batch
        """
        trainer: Any = self
        labels, inputs = inputs["labels"], {key: value for key, value in inputs.items() if key != "labels"}
        how = {"output_hidden_states": True, "logits_to_keep": 1} if self.chunked else {}
        outputs, theirs = model(**inputs, use_cache=False, **how), None
        if self.teacher is not None:
            with torch.no_grad():
                theirs = self.teacher(**inputs, use_cache=False, **how)
        if self.chunked:
            loss = self.distillation_loss.from_hidden(
                outputs.hidden_states[-1],
                trainer.accelerator.unwrap_model(model),
                None if theirs is None else theirs.hidden_states[-1],
                self.teacher,
                labels,
                num_items_in_batch=num_items_in_batch,
            )
        else:
            loss = self.distillation_loss(
                student_logits=outputs.logits,
                teacher_logits=None if theirs is None else theirs.logits,
                labels=labels,
                num_items_in_batch=num_items_in_batch,
            )
        if trainer.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = (
                loss * trainer.accelerator.num_processes
            )  # the count is of all processes; their gradients are averaged
        return (loss, outputs) if return_outputs else loss


class DistillationTrainer(DistillationMixin, Trainer):
    """transformers' `Trainer` with a loss of the zoo."""


def _checked(loss: ZooLoss, *, has_teacher: bool) -> DistillationLoss:
    """The loss, if labels and a teacher are all that it needs. Raises DpkdError otherwise."""
    name = loss.spec.name
    if not isinstance(loss, DistillationLoss):
        what = "pairs of responses" if hasattr(loss, "from_logits") else "responses that the student samples"
        raise DpkdError(f"the loss {name} is one on {what}: use dpkd.losses in a loop of your own, or `dpkd train`")
    if HIDDEN & loss.reads:
        raise DpkdError(f"the loss {name} reads hidden states: use dpkd.losses in a loop of your own, or `dpkd train`")
    if not has_teacher and loss.spec.needs(loss.config) is not TeacherAccess.NONE:
        raise DpkdError(f"the loss {name} needs a teacher: pass teacher=MODEL")
    return loss


def _shared_ids(student: Any, teacher: Any, tokenizer: Any) -> int | None:
    """The ids of the tokenizer where the output heads differ in size, None where they agree."""
    sizes = {model.get_output_embeddings().weight.shape[0] for model in (student, teacher)}
    return len(tokenizer) if len(sizes) > 1 and tokenizer is not None else None
