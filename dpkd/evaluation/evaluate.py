"""Scores of a model on held-out data: text metrics of its own answers, likelihood and divergences on the references."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpkd.data.batches import TokenSequence
from dpkd.data.examples import read_examples
from dpkd.data.settings import DataSettings
from dpkd.data.tokenise import Prompt, tokenise
from dpkd.errors import DpkdError
from dpkd.evaluation.divergences import Divergences, measure
from dpkd.evaluation.predictions import Prediction, write_predictions
from dpkd.evaluation.text_metrics import TextScores, score_texts
from dpkd.models.head import check_head
from dpkd.models.loading import load_model, load_tokenizer
from dpkd.models.settings import ModelSettings, TeacherSettings
from dpkd.models.tokenizers import shared_vocabulary
from dpkd.teachers.live import LiveTeacher
from dpkd.text.sampling import sample
from dpkd.text.settings import SamplingSettings
from dpkd.text.writers import response_seed

__all__ = ["Evaluation", "EvaluationSettings", "answer", "evaluate", "evaluate_model"]

Progress = Callable[[str, int, int], None]  # what, done, of


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated, and how answers are drawn."""

    model: ModelSettings
    data: DataSettings
    teacher: TeacherSettings | None = None
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    seed: int = 10
    output: Path | None = None  # folder for predictions.jsonl and scores.json


@dataclass(frozen=True)
class Evaluation:
    """Scores on one set; `rows` were read, and every one of them was scored."""

    rows: int
    text: TextScores
    divergences: Divergences
    truncated: int

    def as_dict(self) -> dict[str, Any]:
        """For scores.json."""
        return {
            "rows": self.rows,
            "text": self.text.as_dict(),
            **self.divergences.as_dict(),
            "truncated_answers": self.truncated,
        }


def evaluate(settings: EvaluationSettings, *, progress: Progress | None = None) -> Evaluation:
    """Load model, teacher and data, score, and write predictions and scores.

    Raises DpkdError when something cannot be found or does not fit.
    """
    tokenizer = load_tokenizer(settings.model)
    examples = read_examples(settings.data)
    prompts = tokenise(examples.examples, tokenizer, settings.data).prompts
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(settings.model, device=device, dtype=None)
    check_head(model)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    teacher = None
    if settings.teacher is not None and settings.teacher.model is not None:
        loaded = load_model(settings.teacher, device=device, dtype=None)
        size = loaded.get_output_embeddings().weight.shape[0]
        vocabulary = shared_vocabulary(tokenizer, load_tokenizer(settings.teacher), vocabulary, size).size
        teacher = LiveTeacher(loaded, vocabulary, torch.device(device))
    evaluation, predictions = evaluate_model(
        model, prompts, tokenizer, teacher=teacher, vocabulary=vocabulary, sampling=settings.sampling,
        seed=settings.seed, progress=progress,
    )  # fmt: skip
    if settings.output is not None:
        _write(settings, evaluation, predictions, examples.fingerprint)
    return evaluation


def evaluate_model(
    model: Any, prompts: Sequence[Prompt], tokenizer: Any, *, teacher: LiveTeacher | None, vocabulary: int,
    sampling: SamplingSettings, seed: int, progress: Progress | None = None,
) -> tuple[Evaluation, list[Prediction]]:  # fmt: skip
    """Scores of a model in memory. Raises DpkdError unless every row was answered and scored."""
    predictions, truncated = answer(model, prompts, tokenizer, vocabulary, sampling, seed, progress)
    scores = score_texts([p.prediction for p in predictions], [p.references for p in predictions])
    if scores.overall.rows != len(prompts):
        raise DpkdError(f"{scores.overall.rows} rows were scored, but there are {len(prompts)}: no score is given")
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("divergences", done, len(prompts))

    divergences = measure(
        model, [TokenSequence(p.prompt_ids, p.response_ids) for p in prompts], teacher=teacher,
        vocabulary=vocabulary, pad_id=tokenizer.pad_token_id, progress=advance,
    )  # fmt: skip
    return Evaluation(len(prompts), scores, divergences, truncated), predictions


def answer(
    model: Any, prompts: Sequence[Prompt], tokenizer: Any, vocabulary: int, sampling: SamplingSettings, seed: int,
    progress: Progress | None = None,
) -> tuple[list[Prediction], int]:  # fmt: skip
    """The model's answer to every prompt, in their order, and how many ran into the length limit."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("answers", done, len(prompts))

    sampled = sample(
        model, [p.prompt_ids for p in prompts], sampling, eos_ids={tokenizer.eos_token_id},
        pad_id=tokenizer.pad_token_id, seeds=[response_seed(seed, 0, p.id) for p in prompts],
        vocabulary=vocabulary, progress=advance,
    )  # fmt: skip
    predictions = [
        Prediction(
            tokenizer.decode(s.response_ids, skip_special_tokens=True).strip(), p.id, p.text, p.references, seed,
            {"tokens": len(s.response_ids), "truncated": s.truncated},
        )
        for p, s in zip(prompts, sampled, strict=True)
    ]  # fmt: skip
    return predictions, sum(s.truncated for s in sampled)


def _write(
    settings: EvaluationSettings, evaluation: Evaluation, predictions: Sequence[Prediction], fingerprint: str
) -> None:
    assert settings.output is not None
    settings.output.mkdir(parents=True, exist_ok=True)
    write_predictions(settings.output / "predictions.jsonl", predictions)
    facts = {
        **evaluation.as_dict(),
        "model": settings.model.model,
        "teacher": settings.teacher.model if settings.teacher else None,
        "data": {"path": settings.data.path, "fingerprint": fingerprint},
        "sampling": settings.sampling.model_dump(mode="json"),
        "seed": settings.seed,
    }
    (settings.output / "scores.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
