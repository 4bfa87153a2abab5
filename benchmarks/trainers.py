"""Whole runs of TRL's trainers, with the settings that make them do the same work as the others.

TRL's defaults turn bf16 and gradient checkpointing on; both are off here, as everywhere else in these benchmarks.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

from loops import LR, Result, measured

__all__ = ["distillation", "dpo", "gkd"]


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _parts(folder: Path) -> tuple[Any, Any, Any]:
    """Tokenizer, student and teacher, as TRL's users load them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    models = (AutoModelForCausalLM.from_pretrained(folder / n, dtype=torch.float32) for n in ("student", "teacher"))
    return tokenizer, *models


def _common(folder: Path, size: Any) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(dir=folder),
        "per_device_train_batch_size": size.batch,
        "max_steps": size.steps,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def _run(trainer: Any, steps: int, tokens: int) -> Result:
    """`train_runtime` leaves out what TRL does before its first step, to its advantage."""
    said: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, growth = measured(lambda: said.append(trainer.train()))
    return Result(said[0].metrics["train_runtime"], growth, steps, tokens, trainer.model)


def _responses(rows: list[dict[str, str]], tokenizer: Any) -> int:
    """Response tokens of rows, EOS included."""
    return sum(len(tokenizer(row["completion"])["input_ids"]) + 1 for row in rows)


def gkd(folder: Path, size: Any, *, on_policy: bool) -> Result:
    """`GKDTrainer`, JSD, on the data set's responses or on the student's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        tokenizer, student, teacher = _parts(folder)
        rows = _rows(folder / "rows.jsonl")
        names = (("prompt", "user"), ("completion", "assistant"))
        chats = [{"messages": [{"role": role, "content": row[key]} for key, role in names]} for row in rows]
        arguments = GKDConfig(
            lmbda=float(on_policy),
            beta=0.5,
            temperature=1.0,
            max_new_tokens=size.sampled,
            max_length=size.length,
            **_common(folder, size),
        )
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=arguments,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(chats),
        )
    tokens = len(rows) * size.sampled if on_policy else _responses(rows, tokenizer)
    return _run(trainer, size.steps, tokens)


def distillation(folder: Path, size: Any) -> Result:
    """`DistillationTrainer`, JSD on the student's responses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from trl import DistillationConfig, DistillationTrainer

        tokenizer, student, teacher = _parts(folder)
        rows = _rows(folder / "rows.jsonl")
        arguments = DistillationConfig(beta=0.5, max_completion_length=size.sampled, **_common(folder, size))
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=arguments,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        )
    return _run(trainer, size.steps, len(rows) * size.sampled)


def dpo(folder: Path, size: Any) -> Result:
    """`DPOTrainer` with the teacher as the reference: the same loss and forwards as DPKD on fixed pairs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        tokenizer, student, teacher = _parts(folder)
        rows, second = _rows(folder / "rows.jsonl"), _rows(folder / "second.jsonl")
        pairs = [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
            for row, other in zip(rows, second, strict=True)
        ]
        trainer = DPOTrainer(
            model=student,
            ref_model=teacher,
            args=DPOConfig(beta=0.1, max_length=size.length, **_common(folder, size)),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(pairs),
        )
    return _run(trainer, size.steps, _responses(rows, tokenizer) + _responses(second, tokenizer))
