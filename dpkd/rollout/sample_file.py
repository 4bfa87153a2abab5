"""A model's responses to the prompts of a data set, written to a file: SeqKD data, for any tool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dpkd.api import GenerationModel, Sampler, SamplingSettings
from dpkd.data.encode import Prompt, check_ids, tokenize
from dpkd.data.encoding import continuation, end_ids
from dpkd.data.examples import read_examples
from dpkd.data.formats import Example
from dpkd.data.settings import DataSettings
from dpkd.data.templates import chat_lead
from dpkd.data.wording import COMMAND_LINE
from dpkd.errors import DpkdError
from dpkd.io import JsonLog, read_json, write_json
from dpkd.locks import file_lock
from dpkd.models.device import attend_without_plans
from dpkd.models.fingerprint import model_fingerprint
from dpkd.models.loading import load_model, load_tokenizer
from dpkd.models.settings import ModelSettings, TeacherSettings
from dpkd.plugins import Registry
from dpkd.rollout.generator import open_sampler, response_seed, sampling_task
from dpkd.teachers.server.teacher import ServerTeacher


@dataclass(frozen=True)
class SampleReport:
    """How many responses were written now, how many were there from an interrupted call, and which rows have none."""

    written: int
    found: int
    truncated: int
    empty: int
    notes: tuple[str, ...]


def sample_to_file(
    model: ModelSettings,
    data: DataSettings,
    sampling: SamplingSettings,
    *,
    registry: Registry,
    output: Path,
    seed: int,
    num_generations: int = 1,
    backend: str = "hf",
    progress: Callable[[int, int], None] | None = None,
) -> SampleReport:
    """Append one JSON line per response; a second call goes on where an interrupted one stopped.

    A line is the row of the data set with the new response, so that it can be trained on as it is.
    Raises DpkdError when the file was written with other settings, by another model or for other prompts, when it
    is damaged, or while another process writes it.
    """
    with file_lock(output, _settings_file(output)), ExitStack() as stack:
        examples, tokenizer = read_examples(data, require_response=False, wording=COMMAND_LINE), load_tokenizer(model)
        served = ServerTeacher(model) if isinstance(model, TeacherSettings) and model.server is not None else None
        if served is not None:
            served.check(tokenizer)
        facts = {
            "model": model.model,
            "weights": model_fingerprint(str(model.model), model.revision) if served is None else served.fingerprint(),
            "sampling": sampling.model_dump(mode="json", exclude={"batch_size"}),
            "seed": seed,
            "template": data.template,
            "data": examples.fingerprint,
            "num_generations": num_generations,
            **({"backend": {"name": backend}} if backend != "hf" else {}),
        }
        lines = JsonLog(output, id=str, sample=int)
        found = _found(lines, facts)
        tokenized = tokenize(examples.examples, tokenizer, data, require_response=False)
        todo = [p for p in tokenized.prompts if (p.id, num_generations - 1) not in found]
        if served is not None:
            sampler: Sampler = stack.enter_context(closing(served)).sampler()
        else:
            writer = _loaded(model, tokenizer, todo, sampling)
            sampler = stack.enter_context(closing(open_sampler(registry, backend, {}, writer)))
        sampler.refresh()
        by_id = {example.id: example for example in examples.examples}
        lead = chat_lead(tokenizer) if tokenizer.chat_template else ""
        counts: Counter[str] = Counter()
        size = 4 * sampling.batch_size
        for group in (todo[start : start + size] for start in range(0, len(todo), size)):
            drawn = list(_drawn(sampler, group, sampling, seed, num_generations, tokenizer))
            counts.update(written=len(drawn), truncated=sum(one.truncated for one in drawn))
            counts.update(empty=sum(not one.text.strip() for one in drawn))
            lines.append(
                *(
                    {**_row(by_id[one.id], one.text, lead), "id": one.id, "sample": one.number}
                    for one in drawn
                    if (one.id, one.number) not in found
                )
            )
            if progress is not None:
                progress(counts["written"], len(todo) * num_generations)
    dropped = tokenized.report.dropped
    notes = [*examples.lines()[1:], *(f"dropped {count:,}: {why}" for why, count in dropped.items())]
    if any(why.startswith("prompts longer") for why in dropped):
        notes.append("to keep longer prompts: --set data.max_prompt_tokens=N, and a data.max_tokens above it")
    return SampleReport(counts["written"], len(found), counts["truncated"], counts["empty"], tuple(notes))


class _Drawn(NamedTuple):
    """A response to the prompt of an id, and which of several it is."""

    id: str
    number: int
    text: str
    truncated: bool


def _loaded(
    model: ModelSettings, tokenizer: Any, prompts: Sequence[Prompt], sampling: SamplingSettings
) -> GenerationModel:
    attend_without_plans()
    lm = load_model(model, device="cuda" if torch.cuda.is_available() else "cpu", dtype=None)
    check_ids(prompts, lm.get_input_embeddings().weight.shape[0], str(model.model))
    longest = max((len(p.prompt_ids) for p in prompts), default=0) + sampling.max_new_tokens
    return GenerationModel(lm, None, end_ids(tokenizer, lm), tokenizer.pad_token_id, longest=longest)


def _drawn(
    sampler: Sampler, group: Sequence[Prompt], sampling: SamplingSettings, seed: int, count: int, tokenizer: Any
) -> Iterator[_Drawn]:
    """`count` responses to each prompt."""
    seeds = [response_seed(seed, n, p.id) for p in group for n in range(count)]
    task = sampling_task(sampling, [p.prompt_ids for p in group], seeds, num_generations=count, logps=False)
    for place, one in enumerate(sampler.draw(task)):
        prompt = group[place // count]
        # The space between prompt and response belongs to the response: no strip.
        text = continuation(tokenizer, prompt.prompt_ids, one.response_ids)
        yield _Drawn(prompt.id, place % count, text, one.truncated)


def _row(example: Example, text: str, lead: str) -> dict[str, Any]:
    """The prompt's own fields and the response, in a form that `dpkd train` reads.

    `lead` is what a chat template puts before a response: it is put there again when the row is read.
    """
    if example.messages is not None:
        prompt = [{"role": m.role, "content": m.content} for m in example.messages]
        return {"messages": [*prompt, {"role": "assistant", "content": text.removeprefix(lead)}]}
    if example.prompt is not None:
        return {"prompt": example.prompt, "response": text}
    return {"instruction": example.instruction, "input": example.input, "output": text}


def _settings_file(output: Path) -> Path:
    return output.with_name(output.name + ".settings.json")


def _differences(name: str, before: Any, now: Any) -> str:
    """What another call said of one thing.

    >>> _differences("sampling", {"top_k": 0, "max_new_tokens": 8}, {"top_k": 0, "max_new_tokens": 9})
    'sampling (max_new_tokens 8, now 9)'
    """
    if isinstance(before, dict) and isinstance(now, dict):
        pairs = [(f"{key} ", before.get(key), now.get(key)) for key in {**before, **now}]
    else:
        pairs = [("", before, now)]
    said = ", ".join(f"{key}{old}, now {new}" for key, old, new in pairs if old != new)
    return name if name in ("weights", "data") else f"{name} ({said})"  # of hashes nobody learns anything


def _found(lines: JsonLog, facts: dict[str, Any]) -> set[tuple[str, int]]:
    """What an earlier call wrote; its settings stand beside the file, and are there before its first line."""
    output = lines.path
    settings_file = _settings_file(output)
    if not output.exists():
        write_json(settings_file, facts)
        return set()
    before = read_json(settings_file, f"Delete it and {output} to start again.") if settings_file.exists() else {}
    changed = [name for name in facts if before.get(name) != facts[name]]
    if changed:
        raise DpkdError(
            f"{output} exists already, written by another model, for other prompts or with other settings: "
            f"{'; '.join(_differences(name, before.get(name), facts[name]) for name in changed)} "
            f"({settings_file.name}). Choose another --output, or delete it."
        )
    return {(row["id"], row["sample"]) for row in lines.rows()}
