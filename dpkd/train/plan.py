"""The plan of a run, before any weight is loaded: models, text, steps, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text as RichText

from dpkd.api.teachers import Teacher
from dpkd.config.resolve import Resolved
from dpkd.config.settings import RunSettings
from dpkd.data.encode import EncodedData, Prompt
from dpkd.data.encoding import continuation
from dpkd.models.device import device_of, precision_of
from dpkd.models.loading import count_parameters
from dpkd.run_folder import RunFolder
from dpkd.train.cross_tokenizer import union_of
from dpkd.train.defaults import with_defaults
from dpkd.train.memory import MemoryEstimate, memory_estimate
from dpkd.train.optimizers import describe_optimizer
from dpkd.train.prepare import RunData, prepare
from dpkd.train.progress import Display
from dpkd.train.rollouts import open_source

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class RunPlan:
    """The lines of a dry run, by heading, and the rendered first example."""

    sections: dict[str, list[tuple[str, str]]]
    example: str


def dry_run(resolved: Resolved, *, console: Console | None = None) -> RunPlan:
    """Print the plan of a run; loads tokenizer, data and model configurations, but no weights."""
    console = console or Console()
    plan = make_plan(resolved, Display(console))
    for heading, rows in plan.sections.items():
        table = Table(title=heading, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, value in rows:
            table.add_row(name, value)
        console.print(table)
        console.print()
    console.print("first example, as the model sees it:", style="bold")
    console.print(_colored(plan.example))
    return plan


def make_plan(resolved: Resolved, display: Display) -> RunPlan:
    """Work the plan out. Raises DpkdError for all that a run would stumble over before its first step."""
    RunFolder.check_new(resolved.settings.output)
    resolved = with_defaults(resolved, display)
    settings = resolved.settings
    run_data = prepare(resolved, display)
    data, tokenizer = run_data.data, run_data.tokenizer
    student_size = count_parameters(run_data.student_config)
    sections = {
        "loss": [*_loss_rows(resolved), *_layer_rows(run_data)],
        "models": [*_model_rows(settings, student_size, run_data.teacher), *_tokenizer_rows(run_data)],
        "text": open_source(resolved.main, resolved, run_data).describe().rows,
        "training": _training_rows(settings, data, run_data.steps, run_data.data_facts["fingerprint"]),
        "memory (estimate)": memory_rows(memory_estimate(resolved, run_data)),
    }
    return RunPlan(sections, _rendered(data.prompts[0], tokenizer))


def _colored(example: str) -> RichText:
    text = RichText(example)
    text.highlight_regex(r"(?s)⟦.*⟧(?=\n\(trained)", "bold green")
    return text


def _loss_rows(resolved: Resolved) -> list[tuple[str, str]]:
    loss, terms = resolved.loss, resolved.settings.terms
    rows = [
        ("objective", f"{loss.name}: {loss.card.title} ({loss.family} loss, weight {terms.main:g})"),
        ("settings", ", ".join(f"{k}={v}" for k, v in resolved.main.config.model_dump().items()) or "none"),
        ("needs of the teacher", loss.needs(resolved.main.config).value),
    ]
    for extra in resolved.extras:
        text = "the same responses" if extra.shares_text else f"responses by {', '.join(extra.text.writers)}"
        rows.append((f"beside it: {extra.name}", f"{extra.spec.name}, weight {extra.weight:g}, on {text}"))
    for objective in resolved.objectives:
        for name, schedule in objective.schedules.items():
            over = f"{schedule.steps} steps" if schedule.steps else "the whole run"
            rows.append(
                (f"schedule of {name}", f"{schedule.start:g} to {schedule.end:g}, {schedule.shape}, over {over}")
            )
    if terms.lm.weight:
        rows.append(("LM term", f"data-set responses, weight {terms.lm.weight:g}"))
    if terms.pretrain.weight:
        rows.append(
            (
                "pre-training term",
                f"weight {terms.pretrain.weight:g}, share of word-level KD {terms.pretrain.kd_ratio:g}",
            )
        )
    return rows


def _layer_rows(run_data: RunData) -> list[tuple[str, str]]:
    """Which hidden states losses compare; 0 is the embedding."""
    return [
        (f"hidden states of {name}", f"student's {_listed(layers.student)}; teacher's {_listed(layers.teacher)}")
        for name, layers in run_data.layers.items()
    ]


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _model_rows(settings: RunSettings, student: int, teacher: Teacher | None) -> list[tuple[str, str]]:
    how = {
        "pretrained": f"{settings.student.model}",
        "layers": f"layers {settings.student.layers} of the teacher",
        "random": "fresh weights",
    }[settings.student.init]
    rows = [("student", f"{how}, {student / 1e6:,.1f} M parameters" + (", LoRA" if settings.student.lora else ""))]
    rows.append(("teacher", "none" if teacher is None else teacher.describe()))
    return rows


def _tokenizer_rows(run_data: RunData) -> list[tuple[str, str]]:
    """What follows from two tokenizers, where there are two."""
    if run_data.retokenizer is None:
        return []
    sizes = [c.get_text_config().vocab_size for c in (run_data.student_config, run_data.teacher_config) if c]
    union = union_of(run_data.retokenizer, *sizes)
    return [("tokenizers differ", f"aligned spans; {union.sentence()}; no KL to the teacher is measured")]


def _training_rows(settings: RunSettings, data: EncodedData, steps: int, fingerprint: str) -> list[tuple[str, str]]:
    train = settings.train
    per_step = train.batch_size * sum(len(p.response_ids) for p in data.prompts) / len(data.prompts)
    tokens = f"about {per_step:,.0f} a step, {per_step * steps:,.0f} in all (of the data set)"
    return [
        ("data", f"{settings.data.path}, {len(data.prompts):,} examples, fingerprint {fingerprint[:12]}"),
        ("steps", f"{steps:,} of {train.batch_size} examples ({train.micro_batch_size} sequences per forward)"),
        *([("response tokens", tokens)] if per_step else []),
        ("optimizer", describe_optimizer(train)),
        ("precision", precision_of(train.precision, device_of(train.device))),
    ]


def memory_rows(estimate: MemoryEstimate) -> list[tuple[str, str]]:
    """The estimate as rows, with its sum."""
    parts = {name: size for name, size in estimate.parts.items() if size}
    return [
        (name, _size(size))
        for name, size in [*parts.items(), (f"sum, at its peak ({estimate.moment})", estimate.total)]
    ]


def _size(size: float) -> str:
    """With a decimal where it is small.

    >>> _size(3 * 2**30), _size(40 * 2**20), _size(1.25 * 2**20), _size(900)
    ('3.00 GiB', '40 MiB', '1.2 MiB', '< 0.1 MiB')
    """
    if size >= GIB:
        return f"{size / GIB:.2f} GiB"
    mib = size / MIB
    if mib < 0.1:
        return "< 0.1 MiB"
    return f"{mib:.1f} MiB" if mib < 9.95 else f"{mib:,.0f} MiB"


def _rendered(prompt: Prompt, tokenizer: Any) -> str:
    text = _shortened(prompt.text)
    if not prompt.response_ids:
        return f"{text}\n(a prompt alone: the response is written in the run)"
    chosen, rejected = (
        _shortened(continuation(tokenizer, prompt.prompt_ids, ids, special=True))
        for ids in (prompt.response_ids, prompt.rejected_ids)
    )
    trained = f"{text}⟦{chosen}⟧\n(trained: what stands in ⟦ ⟧, {len(prompt.response_ids)} tokens)"
    return f"{trained}\n(rejected: ⟦{rejected}⟧, {len(prompt.rejected_ids)} tokens)" if rejected else trained


def _shortened(text: str) -> str:
    """A text with its middle left out where it would fill the screen."""
    return text if len(text) <= 1200 else f"{text[:600]} [... {len(text) - 1200:,} characters ...] {text[-600:]}"
