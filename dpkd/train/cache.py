"""`dpkd cache`: write down what the teacher says of a run's fixed text, so that the run needs no teacher in memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from dpkd.api import GenerationModel, Signal, Text, Trait
from dpkd.config.resolve import Resolved
from dpkd.data.batches import TokenSequence
from dpkd.data.templates import template_fingerprint
from dpkd.errors import DpkdError
from dpkd.models.tokenizers import tokenizer_fingerprint
from dpkd.rollout.generator import open_sampler
from dpkd.rollout.response_generators import RankShards, TeacherGenerator
from dpkd.rollout.response_store import ResponseStore
from dpkd.teachers.local import LocalTeacher
from dpkd.teachers.store_check import why_not
from dpkd.teachers.store_manifest import Kind, Manifest
from dpkd.teachers.store_writing import write_store
from dpkd.train.prepare import Prepared, prepare
from dpkd.train.progress import Display


@dataclass(frozen=True)
class CacheSettings:
    """Where to write what; `kind` and `k` None: what the loss needs."""

    output: Path
    kind: Kind | None = None
    k: int | None = None
    dtype: str = "float16"
    batch_size: int = 16


def cache(resolved: Resolved, settings: CacheSettings, *, console: Console | None = None) -> Manifest:
    """Write the store of a run. An interrupted call is continued by the next.

    Raises DpkdError when no store can serve the run, or the folder holds other numbers.
    """
    run = resolved.settings
    display = Display(console or Console())
    if run.teacher.model is None:
        raise DpkdError("a store is written by a teacher: name its model with --teacher")
    writers = _writers(resolved)
    kind, k = _kind(resolved, settings)
    prepared = prepare(resolved, display)
    if prepared.translator is not None:
        raise DpkdError("a store has the teacher's numbers for the student's tokens, and their tokenizers differ")
    vocabulary = max(prepared.tokenizer.get_vocab().values()) + 1
    manifest = Manifest(
        kind,
        k,
        resolved.given.fingerprint(run.teacher),
        Path(run.teacher.model).name,
        tokenizer_fingerprint(prepared.tokenizer),
        vocabulary,
        tuple(sorted(writers)),
        prepared.data_facts["fingerprint"],
        template_fingerprint(run.data.template, prepared.tokenizer),
        settings.dtype,
        run.seed,
    )
    for objective in resolved.objectives:
        own = set(objective.writers.values())
        if problem := why_not(objective.spec, objective.config, objective.reads, own, manifest):
            raise DpkdError(problem)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = prepared.teacher
    assert isinstance(teacher, LocalTeacher)
    teacher.load(device)
    teacher.cut(vocabulary)
    sequences = _sequences(resolved, prepared, teacher, manifest, settings.output, display)
    _write(settings, teacher, sequences, manifest, prepared, display)
    display.say(
        f"train without the teacher: the same command with `--set teacher.store={settings.output}` for --teacher"
    )
    return manifest


def _writers(resolved: Resolved) -> set[Text]:
    """Who writes the text that a loss reads the teacher on."""
    reading = {Signal.TEACHER_LOGITS, Signal.TEACHER_LOGPS, Signal.TEACHER_HIDDEN}
    found = {w for o in resolved.objectives if o.reads & reading for w in o.writers.values()}
    if not found:
        raise DpkdError(f"{resolved.loss.name} reads no number of the teacher: it needs no store")
    return found


def _kind(resolved: Resolved, settings: CacheSettings) -> tuple[Kind, int]:
    """What is asked for, or the least that serves the main loss."""
    spec, config = resolved.loss, resolved.loss_config
    kind: Kind
    if settings.kind is not None:
        kind = settings.kind
    elif Signal.TEACHER_LOGITS not in resolved.main.reads:
        kind = "tokens"
    else:
        kind = "sampled" if spec.top_k is None and Trait.LINEAR_IN_TEACHER in spec.traits else "topk"
    enough = spec.top_k(config) if spec.top_k is not None else None
    default = {"tokens": 0, "topk": enough or 64, "sampled": 50}[kind]
    return kind, default if settings.k is None or kind == "tokens" else settings.k


def _sequences(
    resolved: Resolved, prepared: Prepared, teacher: LocalTeacher, manifest: Manifest, output: Path, display: Display
) -> list[TokenSequence]:
    """All fixed text of the run: the data set's responses, and the teacher's, which are written here if need be."""
    prompts = prepared.data.prompts
    sequences = []
    if Text.DATASET in manifest.text:
        sequences += [TokenSequence(p.prompt_ids, p.response_ids) for p in prompts]
    if Text.TEACHER in manifest.text:
        pen = _generator(resolved, prepared, teacher, manifest, output, display)
        written = pen(range(len(prompts)))
        sequences += [TokenSequence(p.prompt_ids, r.ids) for p, r in zip(prompts, written, strict=True)]
    return sequences


def _generator(
    resolved: Resolved, prepared: Prepared, teacher: LocalTeacher, manifest: Manifest, output: Path, display: Display
) -> TeacherGenerator:
    run, tokenizer = resolved.settings, prepared.tokenizer
    text = next(o.text for o in resolved.objectives if Text.TEACHER in o.writers.values())
    store = ResponseStore.open(
        output / "responses",
        model_fingerprint=manifest.model,
        tokenizer_fingerprint=f"{manifest.tokenizer}/{manifest.vocabulary}",
        sampling=text.teacher_sampling,
        seed=run.seed,
        backend=text.backend_key,
    )
    assert teacher.model is not None
    writer = GenerationModel(
        teacher.model, manifest.vocabulary, frozenset({tokenizer.eos_token_id}), tokenizer.pad_token_id
    )
    return TeacherGenerator(
        lambda: open_sampler(resolved.registry, text, writer),
        prepared.data.prompts,
        text.teacher_sampling,
        run.seed,
        RankShards(),
        prepared.context,
        store,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        display.pulse,
    )


def _write(
    settings: CacheSettings,
    teacher: LocalTeacher,
    sequences: list[TokenSequence],
    manifest: Manifest,
    prepared: Prepared,
    display: Display,
) -> None:
    tokens = sum(len(s.response_ids) for s in {(*s.prompt_ids, -1, *s.response_ids): s for s in sequences}.values())
    size = tokens * manifest.bytes_per_token / 2**20
    display.say(
        f"{manifest.sentence()}\n{tokens:,} tokens of {manifest.bytes_per_token:,} bytes: about {size:,.1f} MiB in "
        f"{settings.output}"
    )
    began = time.monotonic()
    with display.bar("caching", len(sequences)):
        written = write_store(
            settings.output,
            teacher,
            sequences,
            manifest,
            pad_id=prepared.tokenizer.pad_token_id,
            batch_size=settings.batch_size,
            progress=lambda done, of: display.at(done),
        )
    found = f", {len(sequences) - written:,} were there" if written < len(sequences) else ""
    display.say(f"{written:,} responses written{found}, {time.monotonic() - began:.0f} s")
