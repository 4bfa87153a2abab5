"""The end of a run: the model, its card, and the word to the user."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpkd.config.layers import get_path
from dpkd.config.resolve import Resolved
from dpkd.data.memory import is_memory
from dpkd.io import link_folder, read_json, remove_folder, sha256, write_json
from dpkd.models.saving import save_model
from dpkd.report.card import CardFacts, write_model_card
from dpkd.run_folder import RunFolder
from dpkd.train.dev import Dev
from dpkd.train.progress import Display

if TYPE_CHECKING:
    from dpkd.train.build import RunParts


def finish(
    resolved: Resolved, folder: RunFolder, run_parts: RunParts, display: Display, step: int, dev: Dev | None = None
) -> None:
    """Put the student where `AutoModelForCausalLM.from_pretrained` finds it, write the card, and mark the run finished.

    With a development set that is the best model, and the last one goes to `last/`. Each part may be done again: a run
    that was killed in here finishes at the next `--resume`.
    """
    timings, student = run_parts.train_step.timings, run_parts.train_step.inner.student
    best = None if dev is None else dev.best_step
    if dev is None or best is None or best == dev.lines[-1]["step"]:
        with timings("model"):
            save_model(student, run_parts.run_data.tokenizer, folder.model)
        if best is not None and dev is not None:
            display.say(f"the last step is the best by dev {dev.settings.metric}: {dev.best:.4g}")
    else:
        last = folder.path / "last"
        with timings("model"):
            save_model(student, run_parts.run_data.tokenizer, last, last.with_name("last-adapter"))
        for name in ("adapter", "model"):  # `model` is never there with weights that are not to stay
            link_folder(dev.saved(best) / name, folder.path / name)
        said = f"the best by dev {dev.settings.metric}: {dev.best:.4g}"
        display.say(f"model is that of step {best}, {said}; the last is {last}")
    with timings("card"):
        write_model_card(folder.path, _card_facts(resolved, folder, read_json(folder.facts)))
    steps = run_parts.run_data.steps
    with timings("hashes"):
        model = {file.name: sha256(file) for file in sorted(folder.model.iterdir()) if file.is_file()}
    marked = {"step": step, "of": steps, "best_step": best, "model": model, "records": folder.records()}
    write_json(folder.marker, marked)
    shutil.rmtree(folder.best, ignore_errors=True)
    display.say(
        f"model    {folder.model}\nmetrics  {folder.metrics}\nscore it dpkd eval --model {folder.path} --data FILE"
    )


def reopen(folder: RunFolder) -> None:
    """Make a finished run one that goes on; its model stays as `model-STEP`, and the best one is still known."""
    facts = read_json(folder.marker)
    kept = folder.path / f"model-{facts['step']}"
    if facts["best_step"] is not None:
        for name in ("adapter", "model"):
            link_folder(folder.path / name, folder.best / f"step-{facts['best_step']:08d}" / name)
    link_folder(folder.model, kept)
    folder.marker.unlink()
    remove_folder(folder.model)


def _card_facts(resolved: Resolved, folder: RunFolder, facts: dict[str, Any]) -> CardFacts:
    settings = resolved.settings
    chosen = {path: get_path(resolved.as_dict(), path) for path in resolved.provenance}
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


def _is_local(name: str) -> bool:
    return is_memory(name) or Path(name).exists()


def _public(name: str) -> str:
    """A local path by its last part: a card travels further than the machine that it was made on."""
    return Path(name).name if Path(name).is_absolute() else name
