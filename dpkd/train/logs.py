"""What a run appends at each logged step: metrics.jsonl, and samples.jsonl with a few responses that it trained on.

Numbers that are not finite are written as the texts NaN, Infinity and -Infinity, which strict readers of JSON accept.
A resumed run drops the lines after its last checkpoint: it writes them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpkd.api import Callback, Training
from dpkd.data.encode import Prompt
from dpkd.data.encoding import continuation
from dpkd.io import JsonLog

EXAMPLES = 2  # of a logged step in samples.jsonl


class MetricsLog(Callback):
    """Appends the metrics of a logged step; the line is on its way to the disk when `on_log` returns."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLog(path, step=int)

    def on_start(self, training: Training, step: int) -> None:
        self._lines.keep(lambda row: row["step"] <= step)

    def on_log(self, training: Training, step: int, line: Mapping[str, Any]) -> None:
        self._lines.append({"step": step, **line})


class SampleLog(Callback):
    """Appends the first examples of a logged step, as text."""

    def __init__(self, path: Path, tokenizer: Any, prompts: Sequence[Prompt]) -> None:
        self._lines, self._tokenizer, self._prompts = JsonLog(path, step=int), tokenizer, prompts

    def on_start(self, training: Training, step: int) -> None:
        self._lines.keep(lambda row: row["step"] <= step)

    def on_log(self, training: Training, step: int, line: Mapping[str, Any]) -> None:
        for index, written in [] if training.responses is None else training.responses.responses[:EXAMPLES]:
            prompt = self._prompts[index]
            texts = [
                {
                    "writer": r.writer.value,
                    "text": continuation(self._tokenizer, prompt.prompt_ids, r.ids),
                    **({} if r.reward is None else {"reward": r.reward}),
                }
                for r in written
            ]
            self._lines.append({"step": step, "id": prompt.id, "prompt": prompt.text, "responses": texts})
