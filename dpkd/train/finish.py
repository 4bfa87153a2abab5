"""The end of a run: the model, its card, and the word to the user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpkd.config.resolve import Resolved
from dpkd.data.memory import is_memory
from dpkd.models.saving import save_model
from dpkd.report.card import CardFacts, write_model_card
from dpkd.run_folder import RunFolder
from dpkd.train.dev import Dev
from dpkd.train.progress import Display

if TYPE_CHECKING:
    from dpkd.train.build import RunParts


def finish(resolved: Resolved, folder: RunFolder, assembly: RunParts, display: Display, dev: Dev | None = None) -> None:
    """Save the student where `AutoModelForCausalLM.from_pretrained` finds it, and write the card."""
    save_model(assembly.train_step.inner.student, assembly.tokenizer, folder.model)
    if dev is not None and dev.lines:
        display.say(dev.finish())
    facts = json.loads(folder.facts.read_text(encoding="utf-8"))
    write_model_card(folder.path, _card_facts(resolved, folder, facts))
    display.say(
        f"model    {folder.model}\nmetrics  {folder.metrics}\nscore it dpkd eval --model {folder.path} --data FILE"
    )


def _card_facts(resolved: Resolved, folder: RunFolder, facts: dict[str, Any]) -> CardFacts:
    settings = resolved.settings
    chosen = {path: _value(resolved.as_dict(), path) for path in resolved.provenance}
    student = settings.student.model or f"{settings.student.init} of the teacher ({settings.student.layers})"
    return CardFacts(
        name=folder.path.name,
        loss=resolved.loss.name,
        card=resolved.loss.card,
        teacher=_public(settings.teacher.model) if settings.teacher.model else None,
        student=_public(student),
        data=_public(settings.data.path),
        steps=facts["steps"],
        examples=facts["data"]["kept"],
        settings={path: _public(value) if isinstance(value, str) else value for path, value in chosen.items()},
        versions={"dpkd": facts["dpkd"], **facts["versions"]},
        base_model=None if _is_local(student) or settings.student.model is None else student,
        datasets=() if _is_local(settings.data.path) else (settings.data.path,),
    )


def _value(values: Any, path: str) -> Any:
    for key in path.split("."):
        values = values[key] if isinstance(values, dict) and key in values else None
    return values


def _is_local(name: str) -> bool:
    return is_memory(name) or Path(name).exists()


def _public(name: str) -> str:
    """A local path by its last part: a card travels further than the machine that it was made on."""
    return Path(name).name if Path(name).is_absolute() else name
