"""Whole runs on a GPU: `dpkd.train` and TRL's trainers on the same models and rows in memory, in bf16."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_tools import CUDA, DEVICE, Book, Clock, Numbers, clean, models


def byte_tokenizer() -> Any:
    """A token per byte, and EOS: no file is needed."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(kinds.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken("<eos>", special=True)])
    made = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", pad_token="<eos>")
    made.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    )
    return made


def rows_of_text(count: int, tiny: bool) -> list[dict[str, str]]:
    """Prompts and two responses of random letters; a token is a letter."""
    rng = random.Random(0)
    sizes = ((4, 8), (4, 8)) if tiny else ((64, 192), (64, 256))

    def text(low: int, high: int) -> str:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(low, high)))

    return [
        {"prompt": text(*sizes[0]), "completion": text(*sizes[1]), "rejected": text(*sizes[1])} for _ in range(count)
    ]


Size = dict[str, int]


def run_ours(loss: str, pair: Any, rows: list[dict[str, str]], size: Size, **settings: Any) -> Numbers:
    """`dpkd.train` on models and rows in memory; its loop is timed."""
    import dpkd
    from dpkd.train.trainer import Trainer

    clock, loop, one = Clock(size["warm"]), Trainer.run, Trainer._step

    def run(self: Any, *arguments: Any) -> int:
        clock.start()
        done = loop(self, *arguments)
        clock.stop()
        return done

    def step(self: Any, *arguments: Any) -> Any:
        done = one(self, *arguments)
        clock.step()
        return done

    Trainer.run, Trainer._step = run, step  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["DPKD_CACHE"] = folder
            pairs = settings.get("text.source") == "preference"
            data = [{"prompt": row["prompt"], "response": row["completion"]} for row in rows]
            if pairs:
                data = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["rejected"]} for r in rows]
            dpkd.train(
                loss=loss,
                student=pair[0],
                teacher=pair[1],
                tokenizer=byte_tokenizer(),
                data=data,
                output=Path(folder) / "run",
                settings={
                    "data.template": "none",
                    "train.steps": size["steps"],
                    "train.batch_size": size["batch"],
                    "train.micro_batch_size": size["batch"] * (1 + pairs),
                    "train.precision": "bf16",
                    "train.device": DEVICE.type,
                    "train.schedule": "constant",
                    "text.sampling.max_new_tokens": size["sampled"],
                    "text.sampling.batch_size": size["batch"],
                    **settings,
                },
            )
    finally:
        Trainer.run, Trainer._step = loop, one  # type: ignore[method-assign]
    return clock.numbers(_response_tokens(rows, size, settings))


def _response_tokens(rows: list[dict[str, str]], size: Size, settings: dict[str, Any]) -> float:
    """Of a step, EOS included."""
    if settings.get("text.source") == "student" or "text.every" in settings:
        return float(size["batch"] * size["sampled"])
    both = sum(len(row["completion"]) + 1 for row in rows)
    if "text.source" in settings:
        both += sum(len(row["rejected"]) + 1 for row in rows)
    return both / (len(rows) / size["batch"])


def run_trl(kind: str, pair: Any, rows: list[dict[str, str]], size: Size) -> Numbers:
    """TRL's trainers on the same rows: bf16, no checkpointing."""
    from copy import deepcopy

    from datasets import Dataset
    from transformers import TrainerCallback

    clock, tokenizer = Clock(size["warm"]), byte_tokenizer()

    class Timed(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            clock.stop()

    student = deepcopy(pair[0])
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": size["batch"],
        "max_steps": size["steps"],
        "lr_scheduler_type": "constant",
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": not CUDA,
        "bf16": CUDA,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in rows])
    names = (("prompt", "user"), ("completion", "assistant"))
    chats = [{"messages": [{"role": role, "content": row[key]} for key, role in names]} for row in rows]
    settings: dict[str, Any] = {"text.source": "student"} if kind.endswith("on-policy") else {}
    if kind.startswith("GKD"):
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        how = GKDConfig(
            lmbda=float(bool(settings)),
            beta=0.5,
            temperature=1.0,
            max_new_tokens=size["sampled"],
            max_length=size["length"],
            **common,
        )
        trainer: Any = GKDTrainer(
            model=student,
            teacher_model=pair[1],
            args=how,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(chats),
        )
    elif kind.startswith("Distillation"):
        from trl import DistillationConfig, DistillationTrainer

        trainer = DistillationTrainer(
            model=student,
            teacher_model=pair[1],
            args=DistillationConfig(beta=0.5, max_completion_length=size["sampled"], **common),
            processing_class=tokenizer,
            train_dataset=prompts,
        )
    else:
        from trl import DPOConfig, DPOTrainer

        settings = {"text.source": "preference"}
        kept = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["rejected"]} for r in rows]
        trainer = DPOTrainer(
            model=student,
            ref_model=pair[1],
            args=DPOConfig(beta=0.1, max_length=size["length"], **common),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(kept),
        )
    trainer.add_callback(Timed())
    trainer.train()
    return clock.numbers(_response_tokens(rows, size, settings))


STUDENT = {"text.source": "student"}
PAIRS = {"text.source": "preference"}
ROLLOUTS = {"text.every": 1, "text.num_iterations": 1}
COMPILED = {"train.compile": "on"}
Rows = list[dict[str, str]]


def part_runs(book: Book, tiny: bool) -> None:
    size: Size = {"batch": 2, "steps": 3, "warm": 1, "sampled": 4, "length": 32} if tiny else {}
    size = size or {"batch": 32, "steps": 24, "warm": 8, "sampled": 128, "length": 512}
    slow = size if tiny else size | {"steps": 8, "warm": 3}
    rows = rows_of_text(size["batch"] * size["steps"], tiny)
    few = rows[: slow["batch"] * slow["steps"]]
    for which in (_beside_peers, _further):  # each with models of its own: TRL's trainers wrap what they are given
        for name, run in which(models("tiny" if tiny else "runs"), rows, size, few, slow).items():
            book.take("runs", name, run)
        clean()


def _beside_peers(pair: Any, rows: Rows, size: Size, few: Rows, slow: Size) -> dict[str, Callable[[], Numbers]]:
    return {
        "dpkd jsd, off-policy": lambda: run_ours("jsd", pair, rows, size),
        "dpkd jsd, on-policy": lambda: run_ours("jsd", pair, few, slow, **STUDENT),
        "dpkd dpo": lambda: run_ours("dpo", pair, rows, size, **PAIRS),
        "dpkd pairs": lambda: run_ours("dpkd", pair, rows, size, **PAIRS),
        "TRL GKD, off-policy": lambda: run_trl("GKD off-policy", pair, rows, size),
        "TRL DistillationTrainer, on-policy": lambda: run_trl("Distillation on-policy", pair, few, slow),
        "TRL DPOTrainer": lambda: run_trl("DPO", pair, rows, size),
        "TRL GKD, on-policy": lambda: run_trl("GKD on-policy", pair, few, slow),
    }


def _further(pair: Any, rows: Rows, size: Size, few: Rows, slow: Size) -> dict[str, Callable[[], Numbers]]:
    return {
        "dpkd minillm": lambda: run_ours("minillm", pair, few, slow, **ROLLOUTS),
        "dpkd jsd, off-policy, rows padded": lambda: run_ours("jsd", pair, rows, size, **{"batch.packing": "off"}),
        "dpkd jsd, off-policy, compiled": lambda: run_ours("jsd", pair, rows, size, **COMPILED),
        "dpkd jsd, on-policy, compiled": lambda: run_ours("jsd", pair, few, slow, **STUDENT, **COMPILED),
        "dpkd pairs, compiled": lambda: run_ours("dpkd", pair, rows, size, **PAIRS, **COMPILED),
        "dpkd minillm, compiled": lambda: run_ours("minillm", pair, few, slow, **ROLLOUTS, **COMPILED),
    }


def part_small(book: Book, tiny: bool) -> None:
    """Models that launch kernels faster than a host does: with and without CUDA graphs of their passes."""
    size: Size = {"batch": 2, "steps": 3, "warm": 1, "sampled": 4, "length": 32} if tiny else {}
    size = size or {"batch": 32, "steps": 60, "warm": 10, "sampled": 128, "length": 512}
    rows = rows_of_text(size["batch"] * size["steps"], tiny)
    pair = models("tiny" if tiny else "small")
    for what, loss, settings in (("kd", "kd", {}), ("pairs", "dpkd", {"text.source": "preference"})):
        for how, graphs in ((", without graphs", "off"), ("", "auto")):
            more = {**settings, "train.cuda_graphs": graphs}
            book.take(
                "small", f"dpkd {what}{how}", lambda loss=loss, more=more: run_ours(loss, pair, rows, size, **more)
            )
