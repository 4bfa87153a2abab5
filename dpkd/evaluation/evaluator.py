"""Scores of a model on held-out data: metrics of its own answers, likelihood and divergences on the references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dpkd.api import MetricSpec, SamplingSettings, TokenScores
from dpkd.api.teachers import Teacher
from dpkd.data.batches import TokenSequence
from dpkd.data.encode import check_ids
from dpkd.data.encoding import continuation
from dpkd.data.settings import DataSettings
from dpkd.data.wording import COMMAND_LINE, Wording
from dpkd.errors import DpkdError, SettingsError
from dpkd.evaluation.answer_cache import AnswerCache, answer, as_answers
from dpkd.evaluation.divergences import measure
from dpkd.evaluation.inputs import Inputs, LongPrompts, read_inputs
from dpkd.evaluation.lengths import DEFAULT_CUTS, WORDS, LengthMeasure, tokens_by
from dpkd.evaluation.predictions import TEACHER, Prediction
from dpkd.evaluation.results import Evaluation, Metric, check_finite, score, score_tokens, write_scores
from dpkd.io import digest
from dpkd.locks import folder_lock
from dpkd.models.device import attend_without_plans
from dpkd.models.head import check_head
from dpkd.models.in_memory import InMemory
from dpkd.models.loading import DTYPES, longest_sequence
from dpkd.models.settings import ModelSettings, TeacherSettings
from dpkd.models.tokenizers import difference, shared_vocabulary
from dpkd.plugins import Registry, load_registry
from dpkd.teachers.local import LocalTeacher

PAPER_SEEDS = (10, 20, 30, 40, 50)  # MiniLLM, appendix: five seeds at T = 1, top-p 1
Progress = Callable[[str, int, int], None]  # what, done, of
REWARDS = ("reward_sum", "reward_mean")  # measured on answers too, with `rewards`


def parse_seeds(text: str) -> tuple[int, ...]:
    """`"10,20"` as numbers. Raises SettingsError unless they are distinct whole numbers.

    >>> parse_seeds("10,20")
    (10, 20)
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise SettingsError([f"--seeds {text!r}: expected distinct comma-separated integers, such as 10,20"])
    return tuple(map(int, parts))


@dataclass(frozen=True)
class EvaluationSettings:
    """How a model is scored on a set.

    rewards       also take the implicit reward of the model's own answers, and of the teacher's
    cuts          ends of the buckets of reference length, in the unit of `lengths` (None: the model's tokens)
    long_prompts  a prompt beyond the limits is an error, or left out and counted
    wording       what messages about the set call settings and options
    """

    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    seeds: Sequence[int] = PAPER_SEEDS
    rewards: bool = False
    cuts: Sequence[int] = DEFAULT_CUTS
    lengths: LengthMeasure | None = WORDS
    long_prompts: LongPrompts = "error"
    wording: Wording = COMMAND_LINE

    @property
    def drawn_seeds(self) -> tuple[int, ...]:
        """Greedy answers are the same under every seed."""
        return tuple(self.seeds[:1]) if self.sampling.temperature == 0 else tuple(self.seeds)


def metric_specs(registry: Registry, say: Callable[[str], None] | None = None) -> dict[str, MetricSpec]:
    """All installed metrics; `say` is told what could not be loaded.

    Raises DpkdError when two plugins have a metric of one name.
    """
    registry.check_conflicts(MetricSpec)
    specs = {name: found.spec for name, found in registry.all(MetricSpec).items()}
    for plugin in registry.broken if say is not None else ():
        assert say is not None
        say(f"the plugin {plugin.entry_point} ({plugin.distribution}) could not be loaded: {plugin.reason}")
    return specs


class Evaluator:
    """A model, and its teacher where there is one, loaded once for all sets.

    A teacher with another tokenizer is left out, and `note` says so: token by token the two cannot be compared.
    """

    def __init__(
        self,
        model: ModelSettings,
        teacher: TeacherSettings | None,
        *,
        dtype: str = "float32",
        in_memory: InMemory | None = None,
        registry: Registry | None = None,
    ) -> None:
        """`dtype` is that of the weights where the settings say `auto`; `auto`: as stored.

        `registry` has the metrics; None: all that are installed.

        `in_memory` has what is in memory of model, teacher and rows; its models keep their type.
        In half precision an answer depends on the rows beside it in its batch; in float32 all but never.
        Raises DpkdError when something cannot be found or does not fit.
        """
        if dtype not in ("auto", *DTYPES):
            raise DpkdError(f"dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
        self.in_memory = in_memory or InMemory()
        self.registry = registry or load_registry()
        self.tokenizer = self.in_memory.tokenizer(model)
        self.note: str | None = None
        if teacher is not None and teacher.model is not None:
            self.note = _left_out(self.tokenizer, self.in_memory.tokenizer(teacher), teacher.model)
            teacher = None if self.note else teacher
        self.names = (model.model, teacher.model if teacher is not None else None)
        attend_without_plans()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = self.in_memory.load(model, device=device, dtype=DTYPES.get(dtype))
        self.dtype = str(self.model.dtype).removeprefix("torch.")
        check_head(self.model)
        self.vocabulary = self.model.get_output_embeddings().weight.shape[0]
        self.teacher = None
        if teacher is not None and teacher.model is not None:
            loaded = self.in_memory.load(teacher, device=device, dtype=DTYPES.get(dtype))
            size = loaded.get_output_embeddings().weight.shape[0]
            shared = shared_vocabulary(self.tokenizer, self.in_memory.tokenizer(teacher), self.vocabulary, size)
            self.vocabulary = shared.size
            self.teacher = LocalTeacher.of(loaded, self.vocabulary, torch.device(device))
            self.teacher_fingerprint = self.in_memory.fingerprint(teacher)
        self.fingerprint = self.in_memory.fingerprint(model)

    @property
    def context(self) -> int | None:
        """The longest sequence that both models read."""
        models = [self.model, *([self.teacher.model] if self.teacher is not None else [])]
        return min((length for model in models if (length := longest_sequence(model))), default=None)

    def inputs(self, data: DataSettings, settings: EvaluationSettings) -> Inputs:
        """The rows of a set, ready for this model."""
        inputs = read_inputs(
            data,
            self.tokenizer,
            context=self.context,
            max_new_tokens=settings.sampling.max_new_tokens,
            long_prompts=settings.long_prompts,
            rows=self.in_memory.rows(data.path),
            wording=settings.wording,
        )
        check_ids(inputs.prompts, self.model.get_input_embeddings().weight.shape[0], "the model")
        return inputs

    def evaluate(
        self,
        name: str,
        data: DataSettings,
        settings: EvaluationSettings,
        *,
        output: Path | None = None,
        progress: Progress | None = None,
        say: Callable[[str], None] | None = None,
    ) -> Evaluation:
        """Score the model on the set of a name; with `output`, answers and scores are written and resumed there.

        Raises DpkdError unless every row was answered and scored, or while another process writes to `output`.
        """
        with nullcontext() if output is None else folder_lock(output, TEACHER):
            return self._evaluate(name, data, settings, output, progress, say)

    def _evaluate(
        self,
        name: str,
        data: DataSettings,
        settings: EvaluationSettings,
        output: Path | None,
        progress: Progress | None,
        say: Callable[[str], None] | None,
    ) -> Evaluation:
        inputs = self.inputs(data, settings)
        for line in (f"{name}: {inputs.rows_read:,} rows of {inputs.source}", *inputs.lines(), self.note):
            if say is not None and line:
                say(line)
        generation = {
            **settings.sampling.model_dump(mode="json", exclude={"batch_size"}),
            "max_prompt_tokens": data.max_prompt_tokens,
            "template": data.template,
            "dtype": self.dtype,
        }
        caches = _Caches() if output is None else self._caches(output, inputs, settings, generation)
        evaluation, predictions, rows = evaluate_model(
            self.model,
            inputs,
            self.tokenizer,
            teacher=self.teacher,
            vocabulary=self.vocabulary,
            settings=settings,
            specs=metric_specs(self.registry, say),
            answer_cache=caches.own,
            teacher_answer_cache=caches.teacher,
            progress=progress,
        )
        evaluation = replace(evaluation, facts=self._facts(name, data, inputs, settings, generation))
        if caches.own is not None:
            for seed, own in predictions.items():
                caches.own.finish(seed, [_scored(p, values) for p, values in zip(own, rows[seed], strict=True)])
            write_scores(evaluation, caches.own.folder)
        return evaluation

    def _caches(
        self, output: Path, inputs: Inputs, settings: EvaluationSettings, generation: Mapping[str, Any]
    ) -> _Caches:
        """What was answered before, in a folder of results."""
        drawn = {
            "weights": self.fingerprint,
            "vocabulary": self.vocabulary,
            "data": inputs.fingerprint,
            "rows": len(inputs.prompts),
            "generation": generation,
        }
        own = AnswerCache(output, drawn)
        if not settings.rewards or self.teacher is None:
            return _Caches(own)
        by_teacher = {**drawn, "weights": self.teacher_fingerprint}
        key = ("the teacher's answers", digest(by_teacher))  # one file for all runs of a process
        return _Caches(own, self.in_memory.remembered(key, lambda: AnswerCache(output / TEACHER, by_teacher)))

    def _facts(
        self, name: str, data: DataSettings, inputs: Inputs, settings: EvaluationSettings, generation: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What scores.json says of model, data and generation."""
        return {
            "set": name,
            "greedy": settings.sampling.temperature == 0,
            "model": self.names[0],
            "teacher": self.names[1],
            "generation": generation,
            "data": {
                "path": data.path,
                "source": inputs.source,
                "fingerprint": inputs.fingerprint,
                "rows_read": inputs.rows_read,
                "skipped": inputs.skipped,
                "cut_references": inputs.cut,
                "min_response_words": data.min_response_words,
                "max_tokens": data.max_tokens,
            },
            "dpkd": version("dpkd"),
        }


class _Caches(NamedTuple):
    """The answers of the model, and those of its teacher, where they are kept."""

    own: AnswerCache | None = None
    teacher: AnswerCache | None = None


def _left_out(tokenizer: Any, others: Any, teacher: str) -> str | None:
    """Why a teacher is not compared with, where its tokenizer is another."""
    if difference(tokenizer, others) is None:
        return None
    return (
        f"the teacher {teacher} has another tokenizer: divergences from it and rewards are not computed, because "
        "token-level KL is undefined across tokenizers. bits_per_byte is comparable across tokenizers."
    )


def _scored(prediction: Prediction, values: dict[str, float]) -> Prediction:
    kept = {name: values[name] for name in ("rouge_l", "exact_match") if name in values}
    return replace(prediction, extra={**prediction.extra, "scores": kept})


def evaluate_model(
    model: Any,
    inputs: Inputs,
    tokenizer: Any,
    *,
    teacher: Teacher | None,
    vocabulary: int,
    settings: EvaluationSettings,
    specs: Mapping[str, MetricSpec],
    answer_cache: AnswerCache | None = None,
    teacher_answer_cache: AnswerCache | None = None,
    progress: Progress | None = None,
) -> tuple[Evaluation, dict[int, list[Prediction]], dict[int, list[dict[str, float]]]]:
    """Scores of a model in memory, its answers by seed, and each answer's own scores.

    Raises DpkdError unless every row was answered and scored.
    """
    tell = progress or (lambda what, done, of: None)
    predictions = answer(
        model,
        inputs.prompts,
        tokenizer,
        vocabulary=vocabulary,
        sampling=settings.sampling,
        seeds=settings.drawn_seeds,
        answer_cache=answer_cache,
        progress=lambda done, of: tell("answers", done, of),
    )
    answers = {seed: as_answers(own) for seed, own in predictions.items()}
    lengths = settings.lengths or tokens_by(tokenizer)
    metrics, buckets, rows = score(answers, specs, cuts=settings.cuts, measure=lengths)
    meter = _DivergenceMeter(model, teacher, tokenizer, vocabulary, tell)
    texts = [continuation(tokenizer, s.prompt_ids, s.response_ids) for s in inputs.sequences]
    text_bytes = sum(len(text.encode()) for text in texts)
    metrics |= score_tokens(meter(inputs.sequences, "divergences", text_bytes), specs)
    if settings.rewards and teacher is not None:
        metrics |= _rewards(meter, inputs, predictions[settings.drawn_seeds[0]], specs, settings, teacher_answer_cache)
    check_finite(metrics)
    evaluation = Evaluation(len(inputs.prompts), settings.drawn_seeds, metrics, buckets, lengths.unit)
    return evaluation, predictions, rows


@dataclass
class _DivergenceMeter:
    """Divergences of a model to its teacher, on whatever responses."""

    model: Any
    teacher: Teacher | None
    tokenizer: Any
    vocabulary: int
    tell: Progress

    def __call__(self, sequences: Sequence[TokenSequence], what: str, text_bytes: int | None = None) -> TokenScores:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.tell(what, done, len(sequences))

        return measure(
            self.model,
            sequences,
            teacher=self.teacher,
            vocabulary=self.vocabulary,
            pad_id=self.tokenizer.pad_token_id,
            text_bytes=text_bytes,
            progress=advance,
        )


def _rewards(
    meter: _DivergenceMeter,
    inputs: Inputs,
    own: Sequence[Prediction],
    specs: Mapping[str, MetricSpec],
    settings: EvaluationSettings,
    answer_cache: AnswerCache | None,
) -> dict[str, Metric]:
    """Implicit reward log q/p of the student's own answers and of the teacher's, under the first seed."""
    assert meter.teacher is not None
    assert meter.teacher.model is not None
    seed = settings.drawn_seeds[0]
    teachers = answer(
        meter.teacher.model,
        inputs.prompts,
        meter.tokenizer,
        vocabulary=meter.vocabulary,
        sampling=settings.sampling,
        seeds=[seed],
        answer_cache=answer_cache,
        progress=lambda done, of: meter.tell("the teacher's answers", done, of),
    )[seed]
    metrics = {}
    for who, answers in (("student", own), ("teacher", teachers)):
        sequences = [
            TokenSequence(prompt.prompt_ids, tuple(p.extra["ids"]))
            for prompt, p in zip(inputs.prompts, answers, strict=True)
        ]
        found = score_tokens(meter(sequences, f"rewards, {who}'s answers"), specs)
        for name in REWARDS:
            title = f"{found[name].title} (answers of the {who})"
            metrics[f"{who}_answer_{name}"] = replace(found[name], title=title)
    return metrics
