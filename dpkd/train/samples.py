"""samples.jsonl: a few prompts with the responses that the run trained on, so that a reader sees the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpkd.api import Callback, StepResponses, Training
from dpkd.data.encode import Prompt
from dpkd.data.encoding import continuation
from dpkd.io import JsonLog

PER_STEP = 2


class SampleLog(Callback):
    """Appends the first examples of a logged step, as text."""

    def __init__(self, path: Path, tokenizer: Any, prompts: Sequence[Prompt]) -> None:
        self._lines, self._tokenizer, self._prompts = JsonLog(path, step=int), tokenizer, prompts

    def on_start(self, training: Training, step: int) -> None:
        """Drop what an interrupted run wrote after its last checkpoint."""
        self.truncate_after(step)

    def on_log(self, training: Training, step: int, line: Mapping[str, Any]) -> None:
        if training.responses is not None:
            self.record(step, training.responses)

    def record(self, step: int, responses: StepResponses) -> None:
        """Write up to two examples of the step that was just done (1-based)."""
        for index, written in responses.responses[:PER_STEP]:
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

    def truncate_after(self, step: int) -> None:
        """Drop what an interrupted run wrote after a step."""
        self._lines.keep(lambda row: row["step"] <= step)
