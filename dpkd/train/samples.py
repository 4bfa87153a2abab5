"""samples.jsonl: a few prompts with the responses that the run trained on, so that a reader sees the text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpkd.data.encode import Prompt
from dpkd.data.encoding import continuation
from dpkd.rollout.base import StepResponses

PER_STEP = 2


class SampleLog:
    """Appends the first examples of a logged step, as text."""

    def __init__(self, path: Path, tokenizer: Any, prompts: Sequence[Prompt]) -> None:
        self._path, self._tokenizer, self._prompts = path, tokenizer, prompts

    def record(self, step: int, responses: StepResponses) -> None:
        """Write up to two examples of the step that was just done (1-based)."""
        with self._path.open("a", encoding="utf-8") as file:
            for index, written in responses.responses[:PER_STEP]:
                prompt = self._prompts[index]
                texts = [
                    {"writer": r.writer.value, "text": continuation(self._tokenizer, prompt.prompt_ids, r.ids)}
                    for r in written
                ]
                line = {"step": step, "id": prompt.id, "prompt": prompt.text, "responses": texts}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def truncate_after(self, step: int) -> None:
        """Drop what an interrupted run wrote after a step."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").split("\n"):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:  # a torn last line
                continue
        self._path.write_text("".join(kept), encoding="utf-8")
