"""When sequence-level DPKD collapses: likelihood term, length normalisation, fresh pairs, β, clipping, reference.

Every run begins with the same fine-tuned student. The table has Rouge-L and divergences on held-out rows, and what
became of the log-probs per token of chosen and rejected responses; the figure has them over the steps. Stale pairs are
written once and gone over again and again.

    python benchmarks/collapse.py --on stories --folder NEW           # stories260K into two of its five layers
    python benchmarks/collapse.py --on dolly --folder NEW --teacher SMOLLM2 --start RUN/model   # see docs/results.md

Called again, it goes on where it was stopped. Needs the shared models and data (DPKD_SHARED, default ../shared).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import yaml
from every_loss import SHARED, STORIES, write_stories

from dpkd.report.reading import read_run
from dpkd.run_folder import RunFolder
from dpkd.run_metrics import collapse_step, logps_per_token
from dpkd.train.sweep import Plan, SweepRun, read_sweep
from dpkd.train.sweep_running import run_sweep

FRESH, STALE = {"text.every": 10, "text.refresh": "every_n_steps"}, {"text.refresh": "once"}
LM, HOW, BETA = "terms.lm.weight", "loss.aggregation", "loss.beta"
# Of the series of a run: the digits, and the values that the table has.
ENDS = ("first", "last")
COURSE = (
    ("chosen", 1, ("first", "lowest", "last")),
    ("rejected", 1, ("first", "lowest", "last")),
    ("margin", 0, ENDS),
    ("gradient", 2, ENDS),
)
NUMBERS = ("rouge_l", "forward_kl", "reverse_kl", "tokens", "eos_rate")


def stories(folder: Path) -> dict[str, Any]:
    """One factor at a time on stories260K, under three training seeds; the student is fine-tuned first.

    `base` has every pair written once, no LM term, means, β = 0.1 and gradients clipped at 1; the name of another stage
    says what differs.
    """
    data, held_out = write_stories(folder)
    given = {"student.model": "{start}", LM: 0.0, **STALE}
    dpkd = {"loss.name": "dpkd", **given, HOW: "mean", BETA: 0.1}
    start = {"loss.name": "sft", "student.init": "layers", "student.layers": 2, "train.steps": 200, "train.lr": 3e-3}
    others = ["dpo", "dpkd-dpop", "dpkd-simpo", "dpkd-cpo", "dpkd-ipo"]
    stages = {
        "start": {"settings": start},
        "base": {"settings": dpkd},
        "fresh": {"settings": {**dpkd, **FRESH}},
        "lm": {"settings": dpkd, "matrix": {LM: [0.1, 1.0]}},
        "sums": {"settings": {**dpkd, HOW: "sum"}},
        "beta": {"settings": dpkd, "matrix": {BETA: [0.01, 1.0]}},
        "beta-fresh": {"settings": {**dpkd, **FRESH}, "matrix": {BETA: [0.01, 1.0]}},
        "clip": {"settings": dpkd, "matrix": {"train.clip": [0.1, None]}},
        "other": {"settings": given, "matrix": {"loss.name": others}},
        "other-fresh": {"settings": {**given, **FRESH}, "matrix": {"loss.name": others}},
    }
    return {
        "seeds": [10, 20, 30],
        "settings": {
            "data.template": "none",
            "data.limit": 160,
            "train.batch_size": 8,
            "train.micro_batch_size": 16,
            "train.steps": 150,
            "train.lr": 1e-3,
            "train.log_every": 10,
            "text.sampling.max_new_tokens": 48,
            "text.teacher_sampling.max_new_tokens": 48,
            "teacher.model": str(STORIES),
            "data.path": str(data),
        },
        "stages": stages,
        "evaluate": {"data": [str(held_out)], "options": {"seeds": "10,20,30", "max_new_tokens": 48, "limit": 100}},
    }


def dolly(teacher: str, start: str) -> dict[str, Any]:
    """6 runs from SmolLM2-135M-Instruct into the student of docs/results.md."""
    of_all = {"loss.name": "dpkd", "student.model": start, "train.steps": 150, "train.lr": 3e-4, "data.limit": 200}
    return {
        "settings": {
            "teacher.model": teacher,
            "student.dropout": "off",
            "data.path": str(SHARED / "data/dolly/train.jsonl"),
            "data.template": "alpaca",
            "data.max_prompt_tokens": 128,
            "data.max_tokens": 192,
            "text.sampling.max_new_tokens": 48,
            "text.teacher_sampling.max_new_tokens": 64,
            "train.batch_size": 4,
            "train.min_lr": 1e-5,
            "train.warmup_steps": 10,
            "train.log_every": 10,
        },
        "stages": {
            "fresh": {"settings": {**of_all, **FRESH, LM: 0.0}, "matrix": {HOW: ["mean", "sum"]}},
            "stale": {"settings": {**of_all, **STALE}, "matrix": {LM: [0.0, 1.0], HOW: ["mean", "sum"]}},
        },
        "evaluate": {
            "data": [str(SHARED / "data/dolly/eval.jsonl")],
            "options": {"limit": 100, "seeds": "10", "max_new_tokens": 64, "long_prompts": "skip"},
        },
    }


def numbers(run: SweepRun) -> dict[str, float]:
    """The scores of a run (none where it was not scored), its log-probs per token, and whether it warned."""
    files = list((run.folder / "eval").rglob("scores.json"))
    scores = json.loads(files[0].read_text(encoding="utf-8"))["metrics"] if files else {}
    found = {name: scores.get(name, {}).get("mean", math.nan) for name in NUMBERS}
    for what, values in series(run.folder).items() if run.stage != "start" else ():
        found[f"{what} first"], found[f"{what} lowest"] = values[0], min(values)
        found[f"{what} last"] = sum(values[-3:]) / 3
    found["warned"] = float(collapse_step(read_run(run.folder).metrics) is not None)  # as the run's own warning
    return found


def series(folder: Path) -> dict[str, list[float]]:
    """At the logged steps: log q(y) / |y| of chosen and rejected responses, reward margin, norm of the gradient."""
    logged = [(logps, m) for m in read_run(folder).metrics if (logps := logps_per_token(m)) is not None]
    return {
        "chosen": [logps[0] for logps, _ in logged],
        "rejected": [logps[1] for logps, _ in logged],
        "margin": [m["reward/margin"] for _, m in logged],
        "gradient": [m["gradient_norm"] for _, m in logged],
    }


def table(plan: Plan) -> str:
    """A line for each group of runs that differ in the seed alone: means, and standard deviations over seeds."""
    lines = [
        "| run | Rouge-L | fKL | rKL | tokens | EOS % | log q(yₜ): first, lowest, last | log q(yₛ) "
        "| margin: first, last | gradient norm | warned |",
        "|---|---:|---:|---:|---:|---:|---|---|---|---|---|",
    ]
    groups: dict[str, list[dict[str, float]]] = {}
    for run in finished(plan):
        groups.setdefault(re.sub(r"-seed_\d+$", "", run.name), []).append(numbers(run))
    for name, of_seeds in groups.items():
        scores = [_mean(of_seeds, key, digits) for key, digits in zip(NUMBERS, (1, 2, 2, 0, 0), strict=True)]
        course = [
            ", ".join(_mean(of_seeds, f"{what} {when}", digits, spread=False) for when in whens)
            for what, digits, whens in COURSE
        ]
        warned = f"{sum(found['warned'] for found in of_seeds):.0f} of {len(of_seeds)}"
        lines.append(f"| {' | '.join([name, *scores, *(course if name != 'start' else [''] * len(course)), warned])} |")
    return "\n".join(lines)


def _mean(of_seeds: list[dict[str, float]], key: str, digits: int, *, spread: bool = True) -> str:
    values = [found.get(key, math.nan) for found in of_seeds]
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if spread and len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def finished(plan: Plan) -> list[SweepRun]:
    """The runs with a model."""
    return [run for run in plan.runs if RunFolder(run.folder).is_finished]


def pairs(plan: Plan) -> list[SweepRun]:
    """The runs on pairs, as far as they have begun."""
    return [run for run in plan.runs if run.stage != "start" and (run.folder / "metrics.jsonl").exists()]


def draw(plan: Plan, path: Path) -> None:
    """Log-probs per token, reverse KL, margin of the rewards and length of the student's responses over the steps."""
    import matplotlib.pyplot as plt

    panels = {
        "log q(yₜ) per token": lambda m: logps_per_token(m)[0],
        "log q(yₛ) per token": lambda m: logps_per_token(m)[1],
        "reverse KL": lambda m: m["kl/reverse"],
        "reward margin": lambda m: m["reward/margin"],
        "length of yₛ": lambda m: m["length/rejected"],
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), layout="constrained")
    for run in (run for run in pairs(plan) if run.turn == 0):
        metrics = [m for m in read_run(run.folder).metrics if logps_per_token(m) is not None]
        style = "-" if "weight_1.0" in run.name else "--"
        for axis, (title, of) in zip(axes, panels.items(), strict=True):
            axis.plot([m["step"] for m in metrics], [of(m) for m in metrics], style, lw=1.2, label=run.name)
            axis.set(title=title, xlabel="step")
    axes[3].set_yscale("symlog")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    figure.savefig(path, dpi=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=["stories", "dolly"], required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--teacher", help="with dolly: the folder of SmolLM2-135M-Instruct")
    parser.add_argument("--show", action="store_true", help="only what is there already: run nothing")
    parser.add_argument("--start", help="with dolly: the model that configs/small/start.yaml gives")
    parser.add_argument("--devices", default="", help="as for dpkd sweep: 0,0 for two processes, on a CPU too")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    values = stories(given.folder) if given.on == "stories" else dolly(given.teacher, given.start)
    path = given.folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"output": str(given.folder / "runs"), **values}, sort_keys=False), encoding="utf-8")
    plan = read_sweep(path)
    if not given.show:
        run_sweep(plan, devices=given.devices.split(",") if given.devices else ())
    print(table(plan))
    draw(plan, given.folder / "curves.png")


if __name__ == "__main__":
    main()
