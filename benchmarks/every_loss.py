"""Train with every installed loss through the command line, and print what became of each student.

    python benchmarks/every_loss.py --on stories     # stories260K: held-out reverse KL must fall by half
    python benchmarks/every_loss.py --on dolly       # SmolLM2-135M on Dolly: 30 steps, the model loads and generates

Both need the shared models and data (DPKD_SHARED, default ../shared); `dolly` also the extra `demo`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import dpkd
from dpkd.api import SamplingSettings
from dpkd.models.loading import load_model, load_tokenizer
from dpkd.models.settings import ModelSettings
from dpkd.models.smollm2 import bundled_teacher
from dpkd.plugins import load_registry
from dpkd.rollout.response_store import default_folder
from dpkd.rollout.sampling import sample

SHARED = Path(os.environ.get("DPKD_SHARED", Path(__file__).parents[2] / "shared"))
STORIES = SHARED / "models" / "stories260K"
# A student of 2 of 5 layers learns with a larger rate than the losses suggest for real models.
STORY_SETTINGS = {
    "student.init": "layers",
    "student.layers": 2,
    "data.template": "none",
    "train.batch_size": 16,
    "train.micro_batch_size": 32,
    "train.lr": 3e-3,
    "train.steps": 400,
    "train.log_every": 50,
    "text.sampling.max_new_tokens": 64,
    "text.teacher_sampling.max_new_tokens": 64,
}
DOLLY_SETTINGS = {
    "student.init": "layers",
    "student.layers": 10,
    "data.limit": 600,
    "data.max_prompt_tokens": 96,
    "data.max_tokens": 160,
    "train.batch_size": 4,
    "train.steps": 30,
    "train.log_every": 10,
    "train.lr": 1e-4,
    "text.sampling.max_new_tokens": 24,
    "text.teacher_sampling.max_new_tokens": 40,
}


def write_stories(folder: Path, count: int = 700) -> tuple[Path, Path]:
    """Stories by the teacher, cut into a beginning and the rest: to train on, and held out."""
    files = folder / "stories.jsonl", folder / "held_out.jsonl"
    if all(path.exists() for path in files):
        return files
    start = "Once upon a time"
    rng, rows = random.Random(0), []
    for text in continued([start] * count, 90):
        words = (start + text).split(" ")
        cut = rng.randint(5, 12)
        rows.append({"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:])})
    folder.mkdir(parents=True, exist_ok=True)
    for path, part in zip(files, (rows[:-100], rows[-100:]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return files


def continued(prompts: Sequence[str], tokens: int, temperature: float = 1.0) -> list[str]:
    """What stories260K writes after each prompt, seeds 0, 1, 2 …"""
    settings = ModelSettings(model=str(STORIES))
    tokenizer, model = load_tokenizer(settings), load_model(settings, device="cpu", dtype=None)
    sampled = sample(
        model,
        [tokenizer(prompt)["input_ids"] for prompt in prompts],
        SamplingSettings(max_new_tokens=tokens, batch_size=128, temperature=temperature),
        eos_ids={tokenizer.eos_token_id},
        pad_id=tokenizer.pad_token_id,
        seeds=list(range(len(prompts))),
    )
    return [tokenizer.decode(one.response_ids, skip_special_tokens=True) for one in sampled]


def train(loss: str, teacher: Path, data: Path, settings: dict[str, object], output: Path) -> float:
    """`dpkd train` in a process of its own; returns its seconds."""
    command = [sys.executable, "-c", "from dpkd.cli.main import main; main()", "train", "--loss", loss]
    command += ["--teacher", str(teacher), "--data", str(data), "--output", str(output)]
    for path, value in settings.items():
        command += ["--set", f"{path}={value}"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return time.monotonic() - began


def divergences(model: str, data: Path, teacher: Path) -> dict[str, float]:
    """Held-out divergences to the teacher."""
    result = dpkd.evaluate(model, str(data), teacher=str(teacher), greedy=True, max_new_tokens=1)
    return {name: metric.mean for name, metric in result.metrics.items()}


def on_stories(losses: list[str], folder: Path) -> None:
    data, held_out = write_stories(folder)
    # One step at a rate of almost 0: the student before training.
    nothing = {**STORY_SETTINGS, "train.steps": 1, "train.lr": 1e-12, "train.min_lr": 0.0}
    train("sft", STORIES, data, nothing, folder / "untrained")
    before = divergences(str(folder / "untrained"), held_out, STORIES)["reverse_kl"]
    print(f"held-out reverse KL before training: {before:.3f}")
    print(f"{'loss':12} {'seconds':>8} {'reverse KL':>11} {'of before':>10}")
    for loss in losses:
        seconds = train(loss, STORIES, data, STORY_SETTINGS, folder / loss)
        after = divergences(str(folder / loss), held_out, STORIES)["reverse_kl"]
        print(f"{loss:12} {seconds:8.0f} {after:11.3f} {after / before:10.2f}", flush=True)


def on_dolly(losses: list[str], folder: Path) -> None:
    teacher = bundled_teacher(default_folder().parent)
    print(f"{'loss':12} {'seconds':>8} {'first':>9} {'last':>9} {'fKL first':>10} {'fKL last':>9}  answer")
    for loss in losses:
        seconds = train(loss, teacher, SHARED / "data/dolly/train.jsonl", DOLLY_SETTINGS, folder / loss)
        lines = [json.loads(line) for line in (folder / loss / "metrics.jsonl").read_text().splitlines()]
        first, last = lines[0], lines[-1]
        print(
            f"{loss:12} {seconds:8.0f} {first['loss/total']:9.3f} {last['loss/total']:9.3f} "
            f"{first['kl/forward']:10.3f} {last['kl/forward']:9.3f}  {generated(folder / loss / 'model')!r}",
            flush=True,
        )


def generated(model: Path) -> str:
    """What transformers alone makes of the saved model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, lm = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    ids = tokenizer("### Instruction:\nName a fruit.\n\n### Response:\n", return_tensors="pt")
    out = lm.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=["stories", "dolly"], required=True)
    parser.add_argument("--loss", action="append", help="only this one; repeatable")
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the runs")
    arguments = parser.parse_args()
    losses = arguments.loss or sorted(load_registry().losses)
    {"stories": on_stories, "dolly": on_dolly}[arguments.on](losses, arguments.folder)


if __name__ == "__main__":
    main()
