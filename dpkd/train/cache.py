"""`dpkd cache`: write down what the teacher says of a run's fixed text, so that the run needs no teacher in memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from dpkd.api import Signal, Trait
from dpkd.api.inputs import TEACHER_LOGPS
from dpkd.api.teachers import Teacher
from dpkd.config.objective import Objective
from dpkd.config.resolve import Resolved
from dpkd.data.batches import TokenSequence
from dpkd.data.templates import template_fingerprint
from dpkd.errors import DpkdError
from dpkd.models.device import attend_without_plans
from dpkd.models.tokenizers import tokenizer_fingerprint
from dpkd.rollout.response_generators import RankShards
from dpkd.teachers.offers import why_not
from dpkd.teachers.store_manifest import Kind, Manifest
from dpkd.teachers.store_writing import write_store
from dpkd.train.prepare import RunData, prepare
from dpkd.train.progress import Display
from dpkd.train.rollouts import open_source, teacher_generator


def cache(
    resolved: Resolved,
    output: Path,
    *,
    kind: Kind | None = None,
    k: int | None = None,
    dtype: str = "float16",
    batch_size: int = 16,
    console: Console | None = None,
) -> Manifest:
    """Write the store of a run into `output`. An interrupted call is continued by the next.

    `kind` and `k` None: what the loss needs; `batch_size` responses are read together.
    Raises DpkdError when no store can serve the run, or the folder holds other numbers.
    """
    run = resolved.settings
    display = Display(console or Console())
    if run.teacher.model is None and run.teacher.server is None:
        raise DpkdError("a store is written by a teacher: name its model with --teacher")
    objectives = _reading(resolved)
    kind, k = _kind(resolved, kind, k)
    if kind == "sampled" and run.teacher.server is not None:
        raise DpkdError("a server gives no tokens drawn from its whole distribution: choose --kind topk or tokens")
    run_data = prepare(resolved, display)
    teacher = run_data.teacher
    assert teacher is not None
    teacher.prepare_for(k, 0)  # what the store keeps, more or less than the loss needs
    if run_data.retokenizer is not None:
        raise DpkdError("a store has the teacher's numbers for the student's tokens, and their tokenizers differ")
    vocabulary = max(run_data.tokenizer.get_vocab().values()) + 1
    manifest = Manifest(
        kind,
        k,
        teacher.fingerprint(),
        Path(run.teacher.model or teacher.fingerprint().rpartition(":")[2]).name,
        tokenizer_fingerprint(run_data.tokenizer),
        vocabulary,
        tuple(sorted({writer for objective in objectives for writer in objective.writers})),
        run_data.data_facts["fingerprint"],
        template_fingerprint(run.data.template, run_data.tokenizer),
        dtype,
        run.seed,
    )
    for objective in resolved.objectives:
        if problem := why_not(
            objective.spec, objective.config, objective.reads, set(objective.writers), manifest.offer
        ):
            raise DpkdError(problem)
    attend_without_plans()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher.load(device)
    teacher.share(run_data.tokenizer, vocabulary)
    with closing(teacher):
        sequences = _sequences(resolved, objectives, run_data, output, display)
        _write(output, teacher, sequences, manifest, run_data, batch_size, display)
    display.say(f"train without the teacher: the same command with `--set teacher.store={output}` for --teacher")
    return manifest


def _reading(resolved: Resolved) -> list[Objective]:
    """The losses that read numbers of the teacher. Raises DpkdError where there is none."""
    reading = {Signal.TEACHER_LOGITS, Signal.TEACHER_HIDDEN, *TEACHER_LOGPS}
    found = [objective for objective in resolved.objectives if objective.reads & reading]
    if not found:
        raise DpkdError(f"{resolved.loss.name} reads no number of the teacher: it needs no store")
    return found


def _kind(resolved: Resolved, kind: Kind | None, k: int | None) -> tuple[Kind, int]:
    """What is asked for, or the least that serves the main loss."""
    spec, config = resolved.loss, resolved.main.config
    if kind is None and Signal.TEACHER_LOGITS not in resolved.main.reads:
        kind = "tokens"
    elif kind is None:
        kind = "sampled" if spec.top_k is None and Trait.LINEAR_IN_TEACHER in spec.traits else "topk"
    enough = spec.top_k(config) if spec.top_k is not None else None
    default = {"tokens": 0, "topk": enough or 64, "sampled": 50}[kind]
    return kind, default if k is None or kind == "tokens" else k


def _sequences(
    resolved: Resolved, objectives: Sequence[Objective], run_data: RunData, output: Path, display: Display
) -> list[TokenSequence]:
    """All fixed text of these losses: the data set's responses, and the teacher's, which are drawn here if need be."""
    prompts = run_data.data.prompts
    assert run_data.teacher is not None
    own = run_data.teacher.text()
    assert own is not None
    sequences: dict[TokenSequence, None] = {}
    for objective in objectives:
        generator = teacher_generator(
            objective.text,
            replace(own, folder=output / "responses"),
            prompts,
            registry=resolved.registry,
            tokenizer=run_data.tokenizer,
            context=run_data.context,
            seed=resolved.settings.seed,
            rank_shards=RankShards(),
            progress=display.pulse,
        )
        source = open_source(objective, resolved, run_data, teacher=generator)
        written = source.fixed(range(len(prompts)))
        sequences |= {TokenSequence(prompts[i].prompt_ids, r.ids): None for i, many in written for r in many}
    return list(sequences)


def _write(
    output: Path,
    teacher: Teacher,
    sequences: list[TokenSequence],
    manifest: Manifest,
    run_data: RunData,
    batch_size: int,
    display: Display,
) -> None:
    tokens = sum(len(s.response_ids) for s in {(*s.prompt_ids, -1, *s.response_ids): s for s in sequences}.values())
    size = tokens * manifest.bytes_per_token / 2**20
    display.say(
        f"{manifest.sentence()}\n{tokens:,} tokens of {manifest.bytes_per_token:,} bytes: about {size:,.1f} MiB in "
        f"{output}"
    )
    began = time.monotonic()
    with display.bar("caching", len(sequences)):
        written = write_store(
            output,
            teacher,
            sequences,
            manifest,
            pad_id=run_data.tokenizer.pad_token_id,
            batch_size=batch_size,
            progress=lambda done, of: display.at(done),
        )
    found = f", {len(sequences) - written:,} were there" if written < len(sequences) else ""
    display.say(f"{written:,} responses written{found}, {time.monotonic() - began:.0f} s")
