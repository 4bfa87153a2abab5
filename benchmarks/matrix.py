"""Every installed loss on every text that it takes, all weights and LoRA alike, through the command line.

stories260K is distilled into two of its five layers for a few steps; printed is what is left of the held-out
divergences to the teacher (1 = as before training), the forward and the reverse KL. A loss fails where neither falls.

    python benchmarks/matrix.py --folder NEW [--steps 60] [--loss NAME ...]

Needs stories260K (DPKD_SHARED, default ../shared) and the extra `peft`. Settings are those of each loss, but for a
larger learning rate: two layers of five have much to learn.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from every_loss import STORIES, write_stories

from dpkd.api import Family, LossSpec, Text
from dpkd.cli.main import app
from dpkd.data.batches import TokenSequence
from dpkd.data.encode import tokenize
from dpkd.data.examples import read_examples
from dpkd.data.settings import DataSettings
from dpkd.evaluation.divergences import measure
from dpkd.models.head import head_of
from dpkd.models.loading import load_model, load_tokenizer
from dpkd.models.settings import ModelSettings, StudentSettings
from dpkd.models.student_init import make_student
from dpkd.plugins import load_registry
from dpkd.teachers.local import LocalTeacher

RATES = {"full": 3e-3, "lora": 5e-3}


TENTH_STEP = {"text.every": 10, "text.refresh": "every_n_steps"}


def texts(spec: LossSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every text that a loss takes: its name, and the settings for it."""
    takes = [writer for writer in (Text.DATASET, Text.TEACHER, Text.STUDENT) if writer in spec.accepts]
    if spec.family is Family.PAIR:
        for chosen in (Text.TEACHER, Text.DATASET):
            for other in (Text.STUDENT, Text.TEACHER, Text.DATASET):
                if chosen is not other and {chosen, other} <= set(takes):
                    pairs = {"text.chosen": chosen.value, "text.rejected": other.value}
                    yield f"{chosen.value} > {other.value}", pairs | TENTH_STEP
        return
    for writer in takes:
        yield writer.value, {"text.source": writer.value, **(TENTH_STEP if writer is Text.STUDENT else {})}
    if len(takes) > 1:
        share = "{" + ", ".join(f"{writer.value}: {1 / len(takes)}" for writer in takes) + "}"
        share = share.replace("0.3333333333333333}", "0.3333333333333334}")
        yield "mixed", {"text.source": "mixed", "text.mix": share, **TENTH_STEP}


def train(loss: str, data: Path, output: Path, settings: dict[str, Any]) -> None:
    """`dpkd train` in this process. Raises what it raises, SystemExit among it."""
    arguments = ["train", "--loss", loss, "--teacher", str(STORIES), "--data", str(data), "--output", str(output)]
    for path, value in settings.items():
        arguments += ["--set", f"{path}={value}"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        app(arguments, standalone_mode=False)


class Judge:
    """Held-out divergences to the teacher."""

    def __init__(self, held_out: Path) -> None:
        settings = ModelSettings(model=str(STORIES))
        self.tokenizer, model = load_tokenizer(settings), load_model(settings, device="cpu", dtype=torch.float32)
        self.teacher = LocalTeacher.of(model, head_of(model).weight.shape[0], torch.device("cpu"))
        rows = DataSettings(path=str(held_out), template="none")
        prompts = tokenize(read_examples(rows).examples, self.tokenizer, rows).prompts
        self.sequences = [TokenSequence(p.prompt_ids, p.response_ids) for p in prompts]

    def __call__(self, student: Any) -> tuple[float, float]:
        """Forward and reverse KL, nats per token."""
        vocabulary = head_of(student).weight.shape[0]
        found = measure(
            student, self.sequences, teacher=self.teacher, vocabulary=vocabulary, pad_id=self.tokenizer.pad_token_id
        )
        return float(found.forward_kl_N.mean()), float(found.reverse_kl_N.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--loss", action="append", help="only this one; repeatable")
    given = parser.parse_args()
    data, held_out = write_stories(given.folder)
    judge, registry = Judge(held_out), load_registry()
    untrained = make_student(
        StudentSettings(init="layers", layers=2), teacher=judge.teacher.model, device=torch.device("cpu"), seed=10
    )
    before = judge(untrained)
    print(f"before training: forward KL {before[0]:.2f}, reverse KL {before[1]:.2f}")
    print("| loss | text | weights | forward KL | reverse KL | seconds |\n|---|---|---|---:|---:|---:|")
    runs, failed = 0, []
    for name in given.loss or sorted(registry.losses):
        for text, settings in texts(registry.get(LossSpec, name).spec):
            for weights, rate in RATES.items():
                began, runs = time.monotonic(), runs + 1
                left = _left(name, data, given.folder / "run", settings, weights, rate, given.steps, judge, before)
                words = " | ".join("failed" if value is None else f"{value:.2f}" for value in left)
                print(f"| {name} | {text} | {weights} | {words} | {time.monotonic() - began:.0f} |", flush=True)
                if None in left or min(value for value in left if value is not None) >= 1:
                    failed.append(f"{name} on {text}, {weights}")
    print(f"\n{runs - len(failed)} of {runs} runs lowered a divergence" + "".join(f"\nnot: {one}" for one in failed))
    sys.exit(bool(failed) or not runs)


def _left(
    name: str,
    data: Path,
    folder: Path,
    text: dict[str, Any],
    weights: str,
    rate: float,
    steps: int,
    judge: Judge,
    before: tuple[float, float],
) -> tuple[float | None, float | None]:
    """What is left of forward and reverse KL after a run, as shares; None where it failed."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = {
        "student.init": "layers",
        "student.layers": 2,
        "data.template": "none",
        "train.batch_size": 8,
        "train.micro_batch_size": 16,
        "train.lr": rate,
        "train.steps": steps,
        "train.log_every": steps,
        "text.sampling.max_new_tokens": 32,
        "text.teacher_sampling.max_new_tokens": 32,
        **text,
    }
    if weights == "lora":
        settings["student.lora"] = "{r: 8}"
    try:
        train(name, data, folder, settings)
    except (Exception, SystemExit) as error:
        print(f"{name}, {weights}: {type(error).__name__}: {error}", file=sys.stderr)
        return None, None
    student = load_model(ModelSettings(model=str(folder / "model")), device="cpu", dtype=torch.float32)
    after = judge(student)
    return after[0] / before[0], after[1] / before[1]


if __name__ == "__main__":
    main()
