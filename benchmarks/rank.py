"""How the metrics of several runs rank them, compared with Rouge-L: Spearman's ρ over the runs.

python benchmarks/rank.py RUN [RUN ...] [--set dolly]       # folders of runs that were evaluated
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from harness import markdown
from scipy.stats import spearmanr


def scores(run: Path, name: str) -> dict[str, float]:
    """Means of a run's metrics on an evaluation set."""
    metrics = json.loads((run / "eval" / name / "scores.json").read_text(encoding="utf-8"))["metrics"]
    return {key: float(value["mean"]) for key, value in metrics.items()}


def ranks(runs: list[dict[str, float]], by: str = "rouge_l") -> dict[str, float]:
    """ρ of each metric that all runs have and that differs between them, with the metric `by`."""
    shared = [key for key in runs[0] if key != by and all(key in run for run in runs)]
    differing = [key for key in shared if len({run[key] for run in runs}) > 1]
    return {key: float(spearmanr([r[by] for r in runs], [r[key] for r in runs]).statistic) for key in differing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--set", default="dolly", help="name of the evaluation set (dolly)")
    arguments = parser.parse_args()
    found = [scores(run, arguments.set) for run in arguments.runs]
    print(f"{len(found)} runs\n")
    print(markdown(["metric", "ρ with Rouge-L"], [[key, f"{rho:+.2f}"] for key, rho in ranks(found).items()]))


if __name__ == "__main__":
    main()
