"""Trainers with a loss of the zoo: one optimizer step against a loop by hand, however the batch is cut."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from tokenizer_kinds import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments
from trl import SFTConfig, SFTTrainer

from dpkd import losses
from dpkd.errors import DpkdError
from dpkd.integrations import DistillationMixin, DistillationTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated"),  # SFTConfig of TRL 1.16 sets it
]
V = 257
LENGTHS = [(5, 3), (5, 1), (5, 4)]  # of prompts and responses: unequal, so that a mean of means is another number


class DistillationSFTTrainer(DistillationMixin, SFTTrainer):
    pass


def llama(seed: int, layers: int, vocabulary: int = V):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(6)
    return model


@pytest.fixture(scope="module")
def models():
    return {"student": llama(0, 1).double(), "teacher": llama(1, 2).double()}


@pytest.fixture(scope="module")
def rows():
    """Ids and labels, unpadded rows of one length each: -100 for the prompt."""
    g = torch.Generator().manual_seed(0)
    made = []
    for prompt, response in LENGTHS:
        ids = torch.randint(0, 256, (prompt + response,), generator=g).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def padded(rows):
    longest = max(len(r["input_ids"]) for r in rows)
    batch = {
        "input_ids": [r["input_ids"] + [256] * (longest - len(r["input_ids"])) for r in rows],
        "attention_mask": [[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows],
        "labels": [r["labels"] + [-100] * (longest - len(r["labels"])) for r in rows],
    }
    return {key: torch.tensor(value) for key, value in batch.items()}


def settings(kind, tmp_path, size):
    return kind(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=len(LENGTHS) // size,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        **({"bf16": False, "completion_only_loss": True} if kind is SFTConfig else {}),
    )


def by_hand(models, rows):
    """One step of SGD on the mean over all tokens, a row at a time, unpadded."""
    student, values = deepcopy(models["student"]), []
    for row in rows:
        ids, prompt = torch.tensor([row["input_ids"]]), row["labels"].count(-100)
        log_q = student(ids).logits[0, prompt - 1 : -1].log_softmax(-1)
        with torch.no_grad():
            log_p = models["teacher"](ids).logits[0, prompt - 1 : -1].log_softmax(-1)
        values.append((log_q.exp() * (log_q - log_p)).sum(-1))
    torch.cat(values).mean().backward()
    for parameter in student.parameters():
        parameter.data -= 0.1 * parameter.grad
    return student


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("chunked", [False, True], ids=["logits", "chunked"])
def test_a_step_of_the_trainer(models, rows, size, chunked, tmp_path):
    student = deepcopy(models["student"])
    trainer = DistillationTrainer(
        student,
        settings(TrainingArguments, tmp_path, size),
        loss="rkl",
        teacher=models["teacher"],
        chunked=chunked,
        train_dataset=rows,
        data_collator=padded,
    )
    trainer.train()
    wanted = by_hand(models, rows)
    for (name, found), before in zip(student.named_parameters(), models["student"].parameters(), strict=True):
        moved = wanted.get_parameter(name) - before
        assert moved.abs().max() > 0
        torch.testing.assert_close(found - before, moved, rtol=1e-4, atol=1e-6 * moved.abs().max().item())


@pytest.mark.parametrize("size", [1, 3])
def test_a_step_of_trls_trainer(models, rows, size, tmp_path):
    student = deepcopy(models["student"])
    data = [{"input_ids": r["input_ids"], "completion_mask": [int(i != -100) for i in r["labels"]]} for r in rows]
    trainer = DistillationSFTTrainer(
        model=student,
        args=settings(SFTConfig, tmp_path, size),
        loss="rkl",
        teacher=models["teacher"],
        processing_class=byte_tokenizer(),
        train_dataset=Dataset.from_list(data),
    )
    trainer.train()
    wanted = by_hand(models, rows)
    for (name, found), before in zip(student.named_parameters(), models["student"].parameters(), strict=True):
        moved = wanted.get_parameter(name) - before
        torch.testing.assert_close(found - before, moved, rtol=1e-3, atol=1e-5 * moved.abs().max().item())


def test_evaluation_reports_the_loss_of_the_zoo(models, rows, tmp_path):
    trainer = DistillationTrainer(
        deepcopy(models["student"]),
        settings(TrainingArguments, tmp_path, 3),
        loss="jsd",
        loss_settings={"beta": 0.3},
        teacher=models["teacher"],
        eval_dataset=rows,
        data_collator=padded,
    )
    batch = padded(rows)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = {f"{who}_logits": model(**batch).logits for who, model in models.items()}
    wanted = losses.get("jsd", beta=0.3)(labels=labels, **logits)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": "kd"}, "the loss kd needs a teacher"),
        ({"loss": "dpkd"}, "one on pairs of responses"),
        ({"loss": "minillm"}, "responses that the student samples"),
        ({"loss": "hidden-mse"}, "reads hidden states"),
    ],
)
def test_what_the_trainer_refuses(models, given, message, tmp_path):
    with pytest.raises(DpkdError, match=message):
        DistillationTrainer(models["student"], settings(TrainingArguments, tmp_path, 1), **given)


def test_heads_of_different_sizes_are_cut_to_the_tokenizer(models, rows, tmp_path):
    trainer = DistillationTrainer(
        deepcopy(models["student"]),
        settings(TrainingArguments, tmp_path, 1),
        teacher=llama(1, 2, V + 7),
        processing_class=byte_tokenizer(),
        train_dataset=rows,
    )
    assert trainer.distillation_loss.vocabulary == V
