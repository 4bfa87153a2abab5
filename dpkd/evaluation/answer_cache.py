"""A model's answers to the rows of a set, written down one by one, so that an interrupted evaluation goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dpkd.api import Answers, Sampled, SamplingSettings
from dpkd.data.encode import Prompt
from dpkd.data.encoding import end_ids
from dpkd.errors import DpkdError
from dpkd.evaluation.predictions import Prediction, check_answers, read_predictions, write_predictions
from dpkd.io import JsonLog, read_json, write_json
from dpkd.rollout.generator import response_seed
from dpkd.rollout.sampling import sample


class AnswerCache:
    """The folder of an evaluation: which answers are there already, under the same settings."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Raises DpkdError when the folder holds answers sampled in another way: by another model, say."""
        self.folder = folder
        self._logs: dict[int, JsonLog] = {}
        manifest = folder / "answers.json"
        if manifest.exists():
            before = read_json(manifest, f"Delete {folder} to evaluate again, or choose another --output.")
            changed = [name for name in facts if before.get(name) != facts[name]]
            if changed:
                raise DpkdError(
                    f"{folder} holds answers sampled in another way: {', '.join(changed)} changed "
                    f"({manifest.name}). Choose another --output, or delete that folder."
                )
        else:
            write_json(manifest, facts)

    def file(self, seed: int) -> Path:
        """Where the answers of a seed are, once they are whole."""
        return self.folder / f"predictions-{seed}.jsonl"

    def _unfinished(self, seed: int) -> JsonLog:
        """The answers of a seed that are not all there yet."""
        if seed not in self._logs:
            self._logs[seed] = JsonLog(self.folder / f"predictions-{seed}.jsonl.part", id=str, prediction=str)
        return self._logs[seed]

    def found(self, seed: int) -> dict[str, Prediction]:
        """The answers of a seed that an earlier call wrote, by row."""
        whole = self.file(seed)
        if whole.exists():
            scores = self.folder / "scores.json"
            if scores.exists():
                check_answers(whole, read_json(scores, "Delete it: `dpkd eval` writes it again."))
            return {str(p.id): p for p in read_predictions(whole)}
        return {row["id"]: _prediction(row) for row in self._unfinished(seed).rows()}

    def append(self, seed: int, prediction: Prediction) -> None:
        """Write one answer down."""
        self._unfinished(seed).append(prediction.as_dict())

    def finish(self, seed: int, predictions: Sequence[Prediction]) -> None:
        """All answers of a seed, in the order of the rows."""
        write_predictions(self.file(seed), predictions)
        self._unfinished(seed).path.unlink(missing_ok=True)


def _prediction(row: dict[str, Any]) -> Prediction:
    own = ("prediction", "id", "prompt", "references", "seed")
    extra = {name: value for name, value in row.items() if name not in own}
    references = tuple(row.get("references", ()))
    return Prediction(row["prediction"], row["id"], row.get("prompt"), references, row.get("seed"), extra)


def answer(
    model: nn.Module,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    *,
    vocabulary: int,
    sampling: SamplingSettings,
    seeds: Sequence[int],
    answer_cache: AnswerCache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, list[Prediction]]:
    """The model's answers to every prompt under each seed, in the order of the prompts; known ones are not drawn again.

    Each row has its own random numbers under a seed, so that neither order nor batch nor an interruption changes an
    answer. Those of all seeds share the batches.
    """
    if len({p.id for p in prompts}) != len(prompts):
        raise DpkdError("two rows of the set have the same id: rename its files so that the ids are distinct")
    known = {seed: answer_cache.found(seed) if answer_cache is not None else {} for seed in seeds}
    todo = [(prompt, seed) for prompt in prompts for seed in seeds if prompt.id not in known[seed]]
    of = len(prompts) * len(seeds)
    done = of - len(todo)

    def finished(place: int, sampled: Sampled) -> None:
        nonlocal done
        prompt, seed = todo[place]
        known[seed][prompt.id] = _written(prompt, sampled, tokenizer, seed)
        if answer_cache is not None:
            answer_cache.append(seed, known[seed][prompt.id])
        done += 1
        if progress is not None:
            progress(done, of)

    if todo:
        sample(
            model,
            [prompt.prompt_ids for prompt, _ in todo],
            sampling,
            eos_ids=end_ids(tokenizer, model),
            pad_id=tokenizer.pad_token_id,
            seeds=[response_seed(seed, 0, prompt.id) for prompt, seed in todo],
            vocabulary=vocabulary,
            on_finished=finished,
        )
    answers = {seed: [known[seed][p.id] for p in prompts] for seed in seeds}
    drawn = {seed for _, seed in todo}
    for seed, own in answers.items():
        if answer_cache is not None and (seed in drawn or not answer_cache.file(seed).exists()):
            answer_cache.finish(seed, own)
    return answers


def _written(prompt: Prompt, sampled: Sampled, tokenizer: Any, seed: int) -> Prediction:
    text = tokenizer.decode(sampled.response_ids, skip_special_tokens=True).strip()
    facts = {"tokens": len(sampled.response_ids), "truncated": sampled.truncated, "ids": list(sampled.response_ids)}
    return Prediction(text, prompt.id, prompt.text, prompt.references, seed, facts)


def as_answers(predictions: Sequence[Prediction]) -> Answers:
    """What metrics see of predictions."""
    return Answers(
        [p.prediction for p in predictions],
        [p.references for p in predictions],
        [int(p.extra["tokens"]) for p in predictions],
        [bool(p.extra["truncated"]) for p in predictions],
        [p.prompt or "" for p in predictions],
    )
