"""Run folders written by hand, as small as they can be. Not a test module: the tests beside it import it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CONFIG = """\
loss:
  name: LOSS  # --loss
  beta: 0.1
teacher:
  model: /models/big  # --teacher
student:
  model: null
  init: layers  # --set
  layers: 3  # --set
data:
  path: /data/stories.jsonl  # --data
  template: 'two  # signs'
train:
  lr: 0.0005
seed: 10
"""


def lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metric_rows(count: int = 3) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "loss/main": 1.0 / step,
            "loss/lm": 2.0,
            "weighted/main": 1.0 / step,
            "weighted/lm": 2.0,
            "loss/total": 2.0 + 1.0 / step,
            "kl/forward": 3.0 / step,
            "kl/reverse": 4.0 / step,
            "reward/chosen": -1.0,
            "reward/rejected": 2.0,
            "reward/margin": -3.0 if step > 1 else "NaN",
            "reward/accuracy": 0.5,
            "length/chosen": 10.0,
            "length/rejected": 12.0,
            "seconds": 2.0,
            "tokens_per_second": 100.0,
            "peak_memory_mib": 500.0 + step,
            "lr": 1e-4,
        }
        for step in range(1, count + 1)
    ]


def make_run(path: Path, loss: str = "dpkd", rows: int = 3) -> Path:
    """A finished run without scores."""
    path.mkdir(parents=True)
    (path / "config.resolved.yaml").write_text(CONFIG.replace("LOSS", loss), encoding="utf-8")
    facts = {
        "dpkd": "0.1.0",
        "versions": {"torch": "2.13"},
        "steps": rows,
        "command": ["/venv/bin/dpkd", "train"],
        "data": {"path": "/data/stories.jsonl", "kept": 5, "examples": 6, "dropped": {"too long": 1}},
        "parameters": {"student": 169152, "teacher": 260032},
    }
    (path / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    lines(path / "metrics.jsonl", metric_rows(rows))
    responses = [{"writer": "teacher", "text": "sampled <b>bold</b>"}, {"writer": "student", "text": ""}]
    lines(path / "samples.jsonl", [{"step": 1, "id": "a:1", "prompt": "Say & hi", "responses": responses}])
    (path / "README.md").write_text(
        textwrap.dedent(
            """\
            ---
            license: mit
            ---

            # run

            ## How to load it

            ```python
            ## Scores
            ```

            ## Sources

            - [A <Paper>](https://example.org/abs?a=1&b=2), Eq. 3
            - [Not a link](javascript:alert(1))
            """
        ),
        encoding="utf-8",
    )
    return path


def add_dev(run: Path, steps: Sequence[int] = (1, 2, 3)) -> None:
    rows = [
        {"step": s, "rouge_l": 10.0 + s, "forward_kl": 2.0 / s, "reverse_kl": 3.0 / s, "reward_mean": -1.0 / s}
        for s in steps
    ]
    lines(run / "dev.jsonl", rows)


def add_scores(
    folder: Path, rouge: Mapping[int, Sequence[float]], *, name: str = "dolly", nll: float = 2.0, answer: str = "hello"
) -> None:
    """`FOLDER/NAME/scores.json` and predictions: Rouge-L of each row by seed."""
    means = [sum(values) / len(values) for values in rouge.values()]
    mean = sum(means) / len(means)
    sd = (sum((m - mean) ** 2 for m in means) / (len(means) - 1)) ** 0.5 if len(means) > 1 else None
    count = len(next(iter(rouge.values())))
    metric = {"mean": mean, "sd": sd, "values": means}
    scores = {
        "format": 2,
        "set": name,
        "rows": count,
        "seeds": list(rouge),
        "greedy": False,
        "model": "m",
        "teacher": None,
        "data": {"path": "d", "fingerprint": "f", "rows_read": count, "skipped": {}},
        "generation": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 60},
        "metrics": {"rouge_l": metric, "nll": {"mean": nll, "sd": None, "values": [nll]}},
        "units": {"rouge_l": "× 100", "nll": "nats per response token"},
        "lengths": {
            "unit": "words",
            "buckets": [
                {"label": "(0,30]", "rows": count, "metrics": {"rouge_l": metric}},
                {"label": "(30,∞)", "rows": 0, "metrics": {}},
            ],
        },
    }
    target = folder / name
    target.mkdir(parents=True)
    (target / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    for seed, values in rouge.items():
        rows = [
            {
                "id": f"r:{i}",
                "prompt": f"Prompt {i}",
                "prediction": answer,
                "references": ["the <reference>"],
                "seed": seed,
                "tokens": 4,
                "truncated": False,
                "scores": {"rouge_l": value},
            }
            for i, value in enumerate(values)
        ]
        lines(target / f"predictions-{seed}.jsonl", rows)
