"""When sequence-level DPKD collapses and when it holds: likelihood term, length normalisation, freshness of pairs, β.

stories260K (pretrained on stories for children) distilled into two of its five layers, which were first fine-tuned
on the same stories. Every run begins there and differs in four settings; the table has Rouge-L and divergences on
held-out stories, and what became of the log-probs per token of preferred and dispreferred responses.

    python benchmarks/collapse.py --folder NEW [--steps 600]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml
from every_loss import STORIES, write_stories

from dpkd.engine.sweep import read_sweep, run_sweep
from dpkd.report.reading import read_run

COMMON = {
    "data.template": "none", "train.batch_size": 16, "train.micro_batch_size": 32, "train.log_every": 20,
    "text.sampling.max_new_tokens": 64, "text.teacher_sampling.max_new_tokens": 64,
}  # fmt: skip


def sweep_file(folder: Path, steps: int) -> tuple[Path, Path]:
    """The file of the sweep, and the held-out rows."""
    data, held_out = write_stories(folder)
    common = COMMON | {"teacher.model": str(STORIES), "data.path": str(data)}
    pairs = {"text.pairs": {"preferred": "teacher", "dispreferred": "student"}}
    values = {
        "output": str(folder / "runs"),
        "settings": common,
        "stages": {
            "start": {"settings": {
                "loss.name": "sft", "student.init": "layers", "student.layers": 2, "train.steps": 400, "train.lr": 3e-3,
            }},
            "dpkd": {
                "settings": {
                    "loss.name": "dpkd", "student.model": "{start}", "train.steps": steps, "train.lr": 1e-3,
                    "text.every": 10, "text.refresh": "every_n_steps", **pairs,
                },
                "matrix": {"terms.lm.weight": [0.0, 1.0], "loss.aggregation": ["mean", "sum"], "loss.beta": [0.1, 1.0]},
            },
            "stale": {
                "settings": {
                    "loss.name": "dpkd", "student.model": "{start}", "train.steps": steps, "train.lr": 1e-3,
                    "text.refresh": "once", **pairs,
                },
                "matrix": {"terms.lm.weight": [0.0, 1.0], "loss.aggregation": ["mean", "sum"], "loss.beta": [0.1, 1.0]},
            },
        },
        "evaluate": {"data": [str(held_out)], "options": {"seeds": "10,20,30", "max_new_tokens": 64}},
    }  # fmt: skip
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path, held_out


def row(folder: Path) -> dict[str, float]:
    """The scores of a run, and its log-probs per token at the start and at the end."""
    scores = json.loads(next((folder / "eval").rglob("scores.json")).read_text(encoding="utf-8"))["metrics"]
    found = {name: scores[name]["mean"] for name in ("rouge_l", "forward_kl", "reverse_kl", "tokens", "eos_rate")}
    lines = [line for line in read_run(folder).metrics if "logp/preferred" in line]
    for which in ("preferred", "dispreferred"):
        for name, part in (("first", lines[:3]), ("last", lines[-3:])):
            values = [line[f"logp/{which}"] / line[f"length/{which}"] for line in part]
            found[f"{which} {name}"] = sum(values) / len(values) if values else float("nan")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    path, _ = sweep_file(arguments.folder, arguments.steps)
    plan = read_sweep(path)
    run_sweep(plan)
    print("| run | Rouge-L | fKL | rKL | tokens | log q(yₜ) first → last | log q(yₛ) first → last |")
    print("|---|---|---|---|---|---|---|")
    for run in plan.runs:
        found = row(run.folder)
        print(
            f"| {run.name} | {found['rouge_l']:.1f} | {found['forward_kl']:.2f} | {found['reverse_kl']:.2f} | "
            f"{found['tokens']:.0f} | {found['preferred first']:.2f} → {found['preferred last']:.2f} | "
            f"{found['dispreferred first']:.2f} → {found['dispreferred last']:.2f} |"
        )


if __name__ == "__main__":
    main()
