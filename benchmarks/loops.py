"""Whole runs that are not a peer's: `dpkd train`, plain loops as the floor, and the published script's shape."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import torch
import torch.nn.functional as F
from harness import peak_mib, resident_mib
from torch import Tensor

from dpkd.data.batches import TokenSequence, collate
from dpkd.models.chunked import chunk_rows, objective
from dpkd.models.head import head_of, hidden_rows
from dpkd.models.loading import load_model, load_tokenizer
from dpkd.models.settings import ModelSettings

__all__ = ["RELEASED_STEPS", "Result", "divergence", "floor", "measured", "ours", "released", "rows_of"]

LR = 5e-4
RELEASED_STEPS = 4  # of the published script's shape: each takes as long as tens of the others


@dataclass(frozen=True)
class Result:
    """What a loop took: seconds, MiB grown, steps, response tokens trained; and the trained model."""

    seconds: float
    growth: float
    steps: int
    tokens: int
    model: Any


def measured(loop: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and MiB of the peak over what the process has before."""
    before = resident_mib()
    began = time.perf_counter()
    loop()
    return time.perf_counter() - began, peak_mib() - before


def _load(folder: Path) -> tuple[Any, Any, Any]:
    """Tokenizer, student and teacher."""
    of = {name: ModelSettings(model=str(folder / name)) for name in ("student", "teacher")}
    student, teacher = (load_model(settings, device="cpu", dtype=torch.float32) for settings in of.values())
    return load_tokenizer(of["student"]), student.train(), teacher.requires_grad_(False)


def rows_of(path: Path, tokenizer: Any) -> list[TokenSequence]:
    """The rows of a file as ids, EOS after each response."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    ids = [[tokenizer(row[key])["input_ids"] for key in ("prompt", "completion")] for row in rows]
    return [TokenSequence(prompt, [*response, tokenizer.eos_token_id]) for prompt, response in ids]


@torch.no_grad()
def divergence(model: Any, folder: Path) -> float:
    """Mean forward KL in nats to the teacher over the response tokens of the probe."""
    tokenizer, _, teacher = _load(folder)
    values = []
    for row in rows_of(folder / "probe.jsonl", tokenizer):
        batch = collate([row], pad_id=tokenizer.eos_token_id)
        log_p, log_q = (
            F.log_softmax(head_of(one).logits(hidden_rows(one, batch)), -1) for one in (teacher, model.eval())
        )
        values.append(peers.dense_loss("fkl", log_q, log_p))
    return float(torch.cat(values).mean())


def ours(folder: Path, size: Any, *, loss: str, on_policy: bool = False, pairs: bool = False) -> Result:
    """`dpkd train`: its loop is measured, after everything is loaded and the teacher's responses are written."""
    from dpkd.cli.main import app
    from dpkd.train.trainer import Trainer

    output = Path(tempfile.mkdtemp(dir=folder)) / "run"
    settings = {
        "data.template": "none",
        "train.device": "cpu",
        "train.steps": size.steps,
        "train.batch_size": size.batch,
        "train.micro_batch_size": (2 if pairs else 1) * size.batch,
        "train.lr": LR,
        "train.schedule": "constant",
        "terms.lm.weight": 0.0,
        "text.store": output.parent / "store",
        "text.sampling.max_new_tokens": size.sampled,
        "text.teacher_sampling.max_new_tokens": size.sampled,
    }
    if on_policy:
        settings["text.source"] = "student"
    if pairs:  # both responses are there before the loop, as DPOTrainer wants them
        settings |= {"text.chosen": "dataset", "text.rejected": "teacher", "text.refresh": "once"}
    words = ["train", "--loss", loss, "--output", str(output), "--data", str(folder / "rows.jsonl")]
    words += ["--student", str(folder / "student"), "--teacher", str(folder / "teacher")]
    words += [word for path, value in settings.items() for word in ("--set", f"{path}={value}")]
    taken: list[tuple[float, float]] = []
    loop = Trainer.run

    def run(*arguments: Any) -> int:
        done: list[int] = []
        taken.append(measured(lambda: done.append(loop(*arguments))))
        return done[0]

    Trainer.run = run  # type: ignore[method-assign]
    try:
        app(words, standalone_mode=False)
    finally:
        Trainer.run = loop  # type: ignore[method-assign]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens = round(sum(line["tokens_per_second"] * line["seconds"] for line in lines))
    return Result(
        *taken[0],
        size.steps,
        tokens,
        load_model(ModelSettings(model=str(output / "model")), device="cpu", dtype=torch.float32),
    )


def _chunked(kind: str, student: Any, teacher: Any, batch: Any) -> Tensor:
    """The mean loss over the response tokens, chunk by chunk."""
    with torch.no_grad():
        of_teacher = hidden_rows(teacher, batch)
    p, q = head_of(teacher), head_of(student)

    def chunk_loss(logits: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            log_p = F.log_softmax(p.logits(of_teacher[rows]), -1)
        return peers.dense_loss(kind, F.log_softmax(logits, -1), log_p).sum() / len(batch.targets)

    return objective(chunk_loss, hidden_rows(student, batch), q, chunk_rows(q.weight.shape[0], 32.0))


@torch.no_grad()
def _sampled(student: Any, rows: Sequence[TokenSequence], new: int, eos: int) -> list[TokenSequence]:
    """Responses by transformers' own `generate`, all of the full length but for a rare EOS."""
    width = max(len(row.prompt_ids) for row in rows)
    ids = torch.tensor([[eos] * (width - len(row.prompt_ids)) + [*row.prompt_ids] for row in rows])
    mask = torch.tensor([[0] * (width - len(row.prompt_ids)) + [1] * len(row.prompt_ids) for row in rows])
    student.eval()
    out = student.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=new, pad_token_id=eos
    )
    student.train()
    return [TokenSequence(row.prompt_ids, line.tolist()) for row, line in zip(rows, out[:, width:], strict=True)]


def floor(folder: Path, size: Any, *, loss: str, on_policy: bool = False) -> Result:
    """A plain loop over length-sorted batches: response positions only, chunked, AdamW, nothing logged."""
    tokenizer, student, teacher = _load(folder)
    rows = sorted(
        rows_of(folder / "rows.jsonl", tokenizer), key=lambda row: len(row.prompt_ids) + len(row.response_ids)
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR)
    tokens: list[int] = []

    def loop() -> None:
        for start in range(0, len(rows), size.batch):
            window: Sequence[TokenSequence] = rows[start : start + size.batch]
            if on_policy:
                window = _sampled(student, window, size.sampled, tokenizer.eos_token_id)
            batch = collate(window, pad_id=tokenizer.eos_token_id)
            optimizer.zero_grad()
            _chunked(loss, student, teacher, batch).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            tokens.append(len(batch.targets))

    taken = measured(loop)
    return Result(*taken, len(tokens), sum(tokens), student)


def released(folder: Path, size: Any) -> Result:
    """The published script's shape: rows padded to one length, full logits, DPKD and pre-training KD."""
    tokenizer, student, teacher = _load(folder)
    rows, eos = rows_of(folder / "rows.jsonl", tokenizer), tokenizer.eos_token_id
    flat = [token for row in rows for part in row for token in part] * (1 + size.batch * size.length // len(rows))
    corpus = peers.padded(
        [TokenSequence((), flat[i * size.length : (i + 1) * size.length]) for i in range(size.batch)], size.length, eos
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR)
    windows = [rows[i : i + size.batch] for i in range(0, len(rows), size.batch)][: min(RELEASED_STEPS, size.steps)]

    def loop() -> None:
        for window in windows:
            optimizer.zero_grad()
            peers.released_loss("dpkd", (student, teacher), peers.padded(window, size.length, eos), corpus).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()

    taken = measured(loop)
    tokens = sum(len(row.response_ids) for window in windows for row in window)
    return Result(*taken, len(windows), tokens, student)
