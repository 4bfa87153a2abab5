"""What can be known about a run before any weight is loaded, and whatever it would stumble over later."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from dpkd.api import Layers, Text
from dpkd.api.teachers import Teacher
from dpkd.config.objective import chosen_ids, kept_tokens
from dpkd.config.resolve import Resolved
from dpkd.config.settings import RunSettings
from dpkd.config.teacher import make_teacher
from dpkd.cross_tokenizer.retokenize import Retokenizer
from dpkd.data.corpus import check_corpus
from dpkd.data.encode import EncodedData, tokenize
from dpkd.data.examples import ExampleSet, read_examples
from dpkd.data.sources import file_stamp
from dpkd.data.templates import with_chat_template
from dpkd.data.wording import DEVELOPMENT
from dpkd.errors import DpkdError
from dpkd.evaluation.evaluator import metric_specs
from dpkd.evaluation.inputs import Inputs, read_inputs
from dpkd.models.loading import context_length
from dpkd.models.student_init import student_config
from dpkd.models.tokenizers import difference, shared_vocabulary, tokenizer_fingerprint
from dpkd.plugins import Registry
from dpkd.teachers.aligned import AlignedTeacher
from dpkd.train.cross_tokenizer import make_retokenizer, token_by_token
from dpkd.train.dev import direction_of
from dpkd.train.hidden_states import bind
from dpkd.train.progress import Display
from dpkd.train.trackers import check_trackers


@dataclass(frozen=True)
class RunData:
    """Data, tokenizers and configurations of a run; `context` is the longest sequence that both models read.

    Where the two tokenizers differ there is a `retokenizer`, and `context` is the student's own.
    """

    tokenizer: Any
    teacher: Teacher | None
    data: EncodedData
    data_facts: dict[str, Any]
    student_config: Any
    context: int | None
    steps: int
    dev: Inputs | None
    layers: Mapping[str, Layers]  # the hidden states that losses read, by the name of the loss
    retokenizer: Retokenizer | None = None

    @property
    def teacher_config(self) -> Any | None:
        """Of the teacher, where it is a causal LM."""
        return None if self.teacher is None else self.teacher.config


def prepare(resolved: Resolved, display: Display) -> RunData:
    """Read and tokenize the data and look at the configurations; says what was kept, skipped and cut.

    Raises DpkdError for whatever would stop the run later: missing packages, layers that a model does not have,
    different tokenizers, text that is longer than a model reads, a corpus that cannot be read.
    """
    settings, in_memory = resolved.settings, resolved.in_memory
    check_trackers(settings.train.trackers)
    teacher = make_teacher(settings.teacher, resolved.registry, in_memory)
    if teacher is not None:
        teacher.prepare_for(kept_tokens(resolved.objectives), chosen_ids(resolved.objectives))
        if teacher.of_student and settings.student.lora is None:
            raise DpkdError(
                "teacher.base: the student has no adapters that could be switched off; --set student.lora.r=16, or "
                "name its model as the teacher"
            )
    teacher_config = None if teacher is None else teacher.config
    own_config = student_config(settings.student, teacher_config, in_memory)
    layers = bind(resolved, {o.name: o.spec.loss(o.config) for o in resolved.objectives}, own_config, teacher_config)
    tokenizer = in_memory.tokenizer(settings.student if settings.student.model is not None else settings.teacher)
    tokenizer = with_chat_template(tokenizer, settings.data.chat_template)
    if teacher is not None:
        teacher.check(tokenizer)
    across = teacher is not None and _two_tokenizers(resolved, tokenizer, teacher, own_config)
    responses = _trains_on_data(resolved)
    pairs = any(objective.text.preferences for objective in resolved.objectives)
    column = None if teacher is None else teacher.column
    examples = _examples(resolved, responses, pairs, column)
    configs = {"student": own_config} if across else {"student": own_config, "teacher": teacher_config}
    limits = {who: context_length(config) for who, config in configs.items() if config is not None}
    if teacher is not None and teacher.context is not None and not across:
        limits["teacher"] = teacher.context
    reads = min((limit for limit in limits.values() if limit is not None), default=None)
    data = in_memory.remembered(
        (
            examples.fingerprint,
            tokenizer_fingerprint(tokenizer),
            settings.data.model_dump_json(),
            responses,
            column,
            reads,
        ),
        lambda: tokenize(examples.examples, tokenizer, settings.data, require_response=responses, context=reads),
    )
    for line in [*examples.lines()[1:], *data.report.lines()]:
        display.say(line)
    retokenizer = None
    if across:
        assert teacher is not None
        retokenizer = make_retokenizer(
            tokenizer, teacher.tokenizer, teacher_config, examples.examples, data.prompts, settings.data
        )
        teacher = AlignedTeacher(teacher, retokenizer)
        display.say("tokenizers differ: both models are compared at aligned spans of text")
    context = _check_lengths(settings, data, limits)
    if settings.terms.pretrain.weight > 0 and settings.terms.pretrain.corpus is not None:
        check_corpus(settings.terms.pretrain.corpus)
    steps = _steps(settings, len(data.prompts), display)
    dev = _dev_inputs(settings, tokenizer, context, resolved.registry, display, column)
    if teacher is not None:
        teacher.meet([*data.prompts, *(dev.prompts if dev is not None else ())])
    facts = {
        "path": examples.source if settings.data.mix else settings.data.path,
        "fingerprint": examples.fingerprint,
        "skipped": examples.skipped_by_reason(),
        **asdict(data.report),
    }
    return RunData(tokenizer, teacher, data, facts, own_config, context, steps, dev, layers, retokenizer)


def _examples(resolved: Resolved, responses: bool, pairs: bool, column: str | None) -> ExampleSet:
    """The rows of the run; those of one file are read once for all runs of this process, while it stays as it is."""
    data, in_memory, seed = resolved.settings.data, resolved.in_memory, resolved.settings.seed
    rows = in_memory.rows(data.path)
    read = partial(
        read_examples, data, require_response=responses, pairs=pairs, rows=rows, seed=seed, teacher_column=column
    )
    stamp = None if data.mix or rows is not None else file_stamp(data.path)
    return (
        read()
        if stamp is None
        else in_memory.remembered((stamp, data.model_dump_json(), responses, pairs, column), read)
    )


def _trains_on_data(resolved: Resolved) -> bool:
    """Whether any loss is taken of the data set's responses; where not, rows may be prompts alone."""
    own = any(Text.DATASET in objective.writers for objective in resolved.objectives)
    return own or resolved.settings.terms.lm.weight > 0


def _two_tokenizers(resolved: Resolved, tokenizer: Any, teacher: Teacher, student_config: Any) -> bool:
    """Whether the two models have different tokenizers. Raises DpkdError where the run needs them to be the same."""
    if teacher.tokenizer is None:
        return False
    what = difference(tokenizer, teacher.tokenizer)
    if what is None:
        sizes = [c.get_text_config().vocab_size for c in (student_config, teacher.config) if c is not None]
        shared_vocabulary(tokenizer, teacher.tokenizer, sizes[0], sizes[-1])
        return False
    if reasons := token_by_token(resolved):
        raise DpkdError(f"student and teacher have different tokenizers, but {'; '.join(reasons)}: {what}")
    return True


def _steps(settings: RunSettings, examples: int, display: Display) -> int:
    """Optimizer steps of the run; a warm-up that they do not end is said."""
    steps = number_of_steps(settings, examples)
    if settings.train.warmup_steps >= steps:
        display.say(
            f"train.warmup_steps is {settings.train.warmup_steps:,}, but there are only {steps:,} steps: "
            "the learning rate will not reach its peak"
        )
    return steps


def _dev_inputs(
    settings: RunSettings,
    tokenizer: Any,
    context: int | None,
    registry: Registry,
    display: Display,
    teacher_column: str | None,
) -> Inputs | None:
    """The rows of the development set. Raises DpkdError when they, or the metric, are not to be had."""
    dev = settings.dev
    if dev.path is None:
        return None
    direction_of(dev.metric, metric_specs(registry))
    data = settings.data.model_copy(
        update={"path": dev.path, "split": dev.split, "limit": dev.limit, "min_response_words": 0}
    )
    inputs = read_inputs(
        data,
        tokenizer,
        context=context,
        max_new_tokens=dev.max_new_tokens,
        long_prompts="skip",
        teacher_column=teacher_column,
        wording=DEVELOPMENT,
    )
    for line in (f"dev: {len(inputs.prompts):,} rows of {inputs.source}", *inputs.lines()):
        display.say(line)
    return inputs


def _check_lengths(settings: RunSettings, data: EncodedData, known: dict[str, int | None]) -> int | None:
    """The longest sequence that all models read, None where none says. Raises DpkdError when text is longer."""
    limits = {who: length for who, length in known.items() if length is not None}
    if not limits:
        return None
    who = min(limits, key=lambda name: limits[name])
    limit = limits[who]
    corpus = settings.terms.pretrain.corpus if settings.terms.pretrain.weight > 0 else None
    problems = []
    if data.report.longest > limit:
        prompts = f" --set data.max_prompt_tokens={limit // 2}" if settings.data.max_prompt_tokens >= limit else ""
        problems.append(
            f"data: the longest sequence has {data.report.longest:,} tokens, but the {who} reads at most {limit:,}. "
            f"Cut responses there: --set data.max_tokens={limit}{prompts}"
        )
    if corpus is not None and corpus.max_tokens > limit:
        problems.append(
            f"terms.pretrain.corpus.max_tokens: is {corpus.max_tokens:,}, but the {who} reads at most {limit:,}. "
            f"Set it to {limit} or less."
        )
    if problems:
        raise DpkdError("\n".join(problems))
    return limit


def number_of_steps(settings: RunSettings, examples: int) -> int:
    """Optimizer steps of a run: `train.steps`, or as many as `train.epochs` take."""
    if settings.train.steps is not None:
        return settings.train.steps
    per_epoch = -(-examples // settings.train.batch_size)
    return max(1, math.ceil(per_epoch * settings.train.epochs * settings.text.student_sampling.num_iterations))
