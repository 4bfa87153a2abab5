"""The comparison of configs/sweeps/evidence-cpu.yaml on very small models, under three training seeds.

The task is to go on with a story by two sentences, and to end there. Its responses are stories260K's own at temperature
0.5; stories260K itself, tuned for the task, is the teacher, one of its five layers is the student. All stages of the
file are run, with rates, lengths and numbers of steps for models of this size.

    python benchmarks/evidence_stories.py --folder NEW --devices 0,0      # half an hour on two cores

Called again, it goes on where it was stopped; `dpkd report NEW/runs` writes the page. Needs the shared models
(DPKD_SHARED, default ../shared).
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import yaml
from every_loss import STORIES, continued

from dpkd.report.experiment import read_experiment
from dpkd.report.ranking import Standing, sets_of, standings
from dpkd.train.sweep import read_sweep
from dpkd.train.sweep_running import run_sweep

FILE = Path(__file__).parents[1] / "configs" / "sweeps" / "evidence-cpu.yaml"
BEGINNING, BEGINNINGS = "Once upon a time", 4000
ROWS = {"train": 1000, "dev": 100, "held_out": 200}
SETTINGS: dict[str, Any] = {
    "teacher.model": str(STORIES),
    "student.layers": 1,
    "data.template": "none",
    "text.sampling.max_new_tokens": 64,
    "text.sampling.batch_size": 64,
    "text.teacher_sampling.batch_size": 64,
    "train.batch_size": 8,
    "train.micro_batch_size": 16,
    "train.steps": 150,
    "train.min_lr": 1e-5,
}
# By stage, over the file's.
STEPS = {"teacher": 200, "start": 600, "lr-token": 50, "lr-pair": 50, "lr-rollout": 50, "lr-greedy": 50}
RATES: dict[str, float | list[float]] = {
    "teacher": 1e-3,
    "start": 3e-3,
    "lr-token": [3e-4, 1e-3, 3e-3],
    "lr-pair": [3e-5, 1e-4, 3e-4, 1e-3],
    "lr-rollout": [3e-5, 1e-4, 3e-4, 1e-3],
    "lr-greedy": [3e-5, 1e-4, 3e-4, 1e-3],
}
COLUMNS = {"nll": 3, "forward_kl": 3, "reverse_kl": 3, "distinct_2": 1, "tokens": 0, "eos_rate": 0}


def write_task(folder: Path) -> None:
    """train.jsonl, dev.jsonl, held_out.jsonl: the first sentence of a story, and the two after it; no row twice."""
    paths = [folder / f"{name}.jsonl" for name in ROWS]
    if all(path.exists() for path in paths):
        return
    beginnings = continued([BEGINNING] * BEGINNINGS, 40, 1.0)
    prompts = list(dict.fromkeys(f"{BEGINNING}{story[0]}" for text in beginnings if (story := sentences(text))))
    rows = {
        prompt: " " + " ".join(story[:2])
        for prompt, story in zip(prompts, map(sentences, continued(prompts, 90, 0.5)), strict=True)
        if story[1:]
    }
    if len(rows) < sum(ROWS.values()):
        raise SystemExit(f"{len(rows)} stories of two sentences and more, expected {sum(ROWS.values())}")
    lines = [json.dumps({"prompt": prompt, "completion": response}) + "\n" for prompt, response in rows.items()]
    folder.mkdir(parents=True, exist_ok=True)
    for path, count in zip(paths, ROWS.values(), strict=True):
        path.write_text("".join(lines[:count]), encoding="utf-8")
        del lines[:count]


def sentences(text: str) -> list[str]:
    """Those that end; the last one of a text that was cut off does not.

    >>> sentences(" He ran. She sat! They")
    [' He ran.', 'She sat!']
    """
    return re.split(r"(?<=[.!?\"])\s+(?=[A-Z\"])", text)[:-1]


def sweep(folder: Path) -> dict[str, Any]:
    """evidence-cpu.yaml for these models."""
    values = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    values["output"] = str(folder / "runs")
    values["seeds"] = [10, 20, 30]
    values["settings"] |= {**SETTINGS, "data.path": str(folder / "train.jsonl"), "dev.path": str(folder / "dev.jsonl")}
    for name, stage in values["stages"].items():
        settings = stage["settings"]
        if name in STEPS:
            settings |= {"train.steps": STEPS[name], "dev.every": 50, "dev.limit": ROWS["dev"]}
        rate = RATES.get(name)
        if isinstance(rate, list):
            stage["matrix"] = {"train.lr": rate}
        elif rate is not None:
            settings["train.lr"] = rate
    values["evaluate"]["data"] = [str(folder / "held_out.jsonl")]
    values["evaluate"]["options"] |= {"seeds": "10,20,30", "limit": ROWS["held_out"], "batch_size": 64, "set": {}}
    return values


def table(runs: Path) -> str:
    """The methods, best first: means, and standard deviations over training seeds; p corrected for their number."""
    experiment = read_experiment(runs)
    lines = [
        f"| method | Rouge-L ↑ | p against {experiment.baseline} | {' | '.join(COLUMNS)} | seconds |",
        f"|---|---:|---:|{'---:|' * len(COLUMNS)}---:|",
    ]
    (name,) = sets_of(experiment, ranked=True)
    lines += [_line(one) for one in standings(experiment, name)]
    for stage, choice in experiment.choices.items():
        tried = ", ".join(f"{_rate(run)}: {value:.1f}" for run, value in choice["values"].items())
        lines.append(f"\n{stage}: {tried}; chosen {_rate(choice['run'])}")
    return "\n".join(lines)


def _rate(run: str) -> str:
    """The learning rate in the name of a run.

    >>> _rate("lr-pair-lr_3e_05")
    '3e-05'
    """
    return run.rpartition("-lr_")[2].replace("_", "-")


def _line(one: Standing) -> str:
    found = one.scored.metrics
    name = one.run.name if one.rank else f"*{one.run.name}*"
    deviation = found["rouge_l"].get("sd")
    rouge = f"{one.mean:.1f}" + (f" ± {deviation:.1f}" if deviation is not None else "")
    p = f"{one.difference.corrected:.3f}" if one.difference and one.difference.corrected is not None else ""
    numbers = [f"{found[key]['mean']:.{digits}f}" if key in found else "–" for key, digits in COLUMNS.items()]
    seconds = one.run.cost.seconds
    return f"| {' | '.join([name, rouge, p, *numbers, '–' if seconds is None else f'{seconds:.0f}'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--devices", default="", help="as for dpkd sweep: 0,0 for two processes, on a CPU too")
    parser.add_argument("--show", action="store_true", help="only what is there already: run nothing")
    given = parser.parse_args()
    if not given.show:
        write_task(given.folder)
        path = given.folder / "sweep.yaml"
        path.write_text(yaml.safe_dump(sweep(given.folder), sort_keys=False), encoding="utf-8")
        run_sweep(read_sweep(path), devices=given.devices.split(",") if given.devices else ())
    print(table(given.folder / "runs"))


if __name__ == "__main__":
    main()
