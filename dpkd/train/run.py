"""What the command line and Python call: train, resume, and the dry run."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dpkd.api import Callback, TeacherLost
from dpkd.config.resolve import Resolved
from dpkd.config.write import write_config
from dpkd.errors import DpkdError, Stopped
from dpkd.evaluation.evaluator import metric_specs
from dpkd.models.device import (
    allow_tf32,
    attend_without_plans,
    device_of,
    out_of_memory,
    precision_of,
    precision_sentence,
)
from dpkd.models.in_memory import InMemory
from dpkd.run_folder import RunFolder
from dpkd.train import checkpoint
from dpkd.train.build import RunParts, assemble
from dpkd.train.defaults import with_defaults
from dpkd.train.dev import Dev
from dpkd.train.facts import change_facts, check_same, write_facts
from dpkd.train.finish import finish, reopen
from dpkd.train.guard import RunawayGuard
from dpkd.train.interrupt import StopRequest, on_stop
from dpkd.train.logs import MetricsLog, SampleLog
from dpkd.train.nonfinite import NotFinite
from dpkd.train.probe import probe
from dpkd.train.progress import Display
from dpkd.train.timings import Timings
from dpkd.train.trackers import Trackers
from dpkd.train.trainer import Trainer
from dpkd.train.zero import unseen_by_accelerate

if TYPE_CHECKING:
    from accelerate import Accelerator


def train(
    resolved: Resolved,
    *,
    callbacks: Sequence[Callback] = (),
    console: Console | None = None,
    timings: Timings | None = None,
    last_checkpoint: bool = True,
) -> RunFolder:
    """Run a distillation from the start and return its folder.

    `timings` measures where the time goes; it is said at the end. Without `last_checkpoint`, a run that reaches its end
    saves its model only: it cannot be given more steps.
    Raises DpkdError for whatever the user can put right, NotFinite when numbers explode, and Stopped when the user
    stops it before its end.
    """
    RunFolder.check_new(resolved.settings.output)
    timings = timings or Timings()
    with timings("imports"):  # accelerate's, for the most part
        accelerator = _accelerator(resolved)
    display = Display(console or Console(), is_main=accelerator.is_main_process)
    display.say(precision_sentence(accelerator.device, accelerator.mixed_precision))
    with timings("config"):
        resolved = with_defaults(resolved, display)
    run_parts = assemble(resolved, accelerator, display, timings)
    _check_processes_agree(accelerator, run_parts)
    folder = _shared_folder(accelerator, resolved)
    display.say(f"run folder: {folder.path}")
    with _locked(folder, accelerator):
        if accelerator.is_main_process:
            write_facts(folder, resolved, run_parts)  # first: a folder with nothing else can be started again
            write_config(resolved, folder.path)
        return _run(
            resolved, folder, run_parts, accelerator, display, callbacks=callbacks, last_checkpoint=last_checkpoint
        )


def resume(
    resolved: Resolved,
    folder: RunFolder,
    *,
    changes: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    console: Console | None = None,
    timings: Timings | None = None,
) -> RunFolder:
    """Continue a run from its newest whole checkpoint, bit for bit; without one, from the start.

    `changes` are the settings, by dotted path, that are not what they were; `timings` as in `train`. What an interrupt
    left undone in the folder is made up for. Raises DpkdError when data or models are not those that the run began
    with, or when what the folder holds is damaged.
    """
    accelerator = _accelerator(resolved)
    display = Display(console or Console(), is_main=accelerator.is_main_process)
    display.say(precision_sentence(accelerator.device, accelerator.mixed_precision))
    with _locked(folder, accelerator):
        run_parts = assemble(resolved, accelerator, display, timings)
        _check_processes_agree(accelerator, run_parts)
        if folder.facts.is_file():
            check_same(folder, run_parts)
        elif accelerator.is_main_process:
            display.say(f"{folder.facts} is lost: written again from what data and models are now")
            write_facts(folder, resolved, run_parts)
        accelerator.wait_for_everyone()
        newest = checkpoint.newest_whole(folder.checkpoints, display.say)
        start = 0 if newest is None else newest.step
        if accelerator.is_main_process:
            if changes and folder.is_finished:
                reopen(folder)
            if changes:
                change_facts(folder, run_parts, start, changes)
                write_config(resolved, folder.path)
        if newest is None:
            display.say(f"{folder.path} has no checkpoint yet: training from the first step")
        accelerator.wait_for_everyone()
        return _run(resolved, folder, run_parts, accelerator, display, newest, callbacks=callbacks)


def _locked(folder: RunFolder, accelerator: Accelerator) -> AbstractContextManager[None]:
    """The main process writes, and holds the lock."""
    return folder.lock() if accelerator.is_main_process else nullcontext()


def _check_processes_agree(accelerator: Accelerator, run_parts: RunParts) -> None:
    """Raises DpkdError, in every process, when one has other data or another teacher than the first."""
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    own = {"data": run_parts.facts["data"]["fingerprint"], **run_parts.facts["models"]}
    first, *others = gather_object([own])
    if odd := sorted({what for other in others for what in first if other.get(what) != first[what]}):
        raise DpkdError(f"the processes of this run differ in their {' and '.join(odd)}: give all of them the same")


def _accelerator(resolved: Resolved) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import set_seed

    # accelerate keeps the first run's precision for the whole process; each run decides its own.
    AcceleratorState._reset_state()
    train = resolved.settings.train
    set_seed(resolved.settings.seed)
    precision = precision_of(train.precision, device_of(train.device))
    allow_tf32()
    attend_without_plans()
    with unseen_by_accelerate():
        return Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=train.device == "cpu")


def _shared_folder(accelerator: Accelerator, resolved: Resolved) -> RunFolder:
    """The main process makes the folder, all use it."""
    if accelerator.num_processes == 1:
        return RunFolder.create(resolved.settings.output, resolved.loss.name)
    from accelerate.utils import broadcast_object_list

    made = [RunFolder.create(resolved.settings.output, resolved.loss.name)] if accelerator.is_main_process else [None]
    folder: RunFolder = broadcast_object_list(made)[0]
    return folder


def _run(
    resolved: Resolved,
    folder: RunFolder,
    run_parts: RunParts,
    accelerator: Accelerator,
    display: Display,
    newest: checkpoint.Checkpoint | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    last_checkpoint: bool = True,
) -> RunFolder:
    dev = _dev(resolved, folder, run_parts, accelerator)
    extras = _callbacks(resolved, folder, run_parts, accelerator, dev)
    trainer = Trainer(
        accelerator=accelerator,
        train_step=run_parts.train_step,
        builder=run_parts.builder,
        schedules=run_parts.schedules,
        settings=resolved.settings.train,
        folder=folder,
        display=display,
        callbacks=[*extras, *callbacks],
    )
    timings, start = run_parts.train_step.timings, 0 if newest is None else newest.step
    if newest is not None:
        restored = checkpoint.load(
            newest,
            module=run_parts.train_step.inner,
            optimizer=run_parts.train_step.torch_optimizer,
            zero=run_parts.train_step.zero,
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
            device=accelerator.device,
        )
        trainer.restore(*restored)
        display.say(f"continuing {folder.path} after step {start} of {run_parts.run_data.steps}")
    again = f"continue with: {_resume_call(folder, resolved.in_memory)}"
    try:
        with _explained(folder, again):
            if resolved.settings.batch.probe:
                what = probe(run_parts.train_step, run_parts.builder, resolved.settings.train.batch_size)
                display.say(f"probe: {what}")
            with timings("text"):
                _write_teacher_text(run_parts, again)
            with on_stop(StopRequest()) as stop:
                done = trainer.run(start, stop)
                timings.begin_end(max(0, done - start - 1))
                ended = done == run_parts.run_data.steps or trainer.ended is not None
                with timings("checkpoint"):
                    if last_checkpoint or not ended:
                        trainer.save(done)
                    else:
                        run_parts.train_step.check()
                        checkpoint.check_finite(run_parts.train_step.inner)
    finally:
        display.close()
        run_parts.close()
        trainer.close()
    if not ended:
        raise Stopped(f"stopped after step {done}; {again}", stop.signal_number)
    accelerator.wait_for_everyone()
    is_main = accelerator.is_main_process
    run_parts.train_step.lend_saved(
        lambda _: finish(resolved, folder, run_parts, display, done, dev) if is_main else None
    )
    accelerator.wait_for_everyone()
    for line in timings.lines():
        display.say(line)
    return folder


@contextmanager
def _explained(folder: RunFolder, again: str) -> Iterator[None]:
    """What ends a run in the block, with what was kept of it and how to go on."""
    try:
        yield
    except RuntimeError as error:
        if (word := out_of_memory(error)) is None:
            raise
        raise DpkdError(word) from error
    except TeacherLost as error:
        raise TeacherLost(f"training stopped: {error}. What was done is kept; {again}") from error
    except NotFinite as error:
        kept = checkpoint.latest(folder.checkpoints)
        where = f"the last good checkpoint is {kept.path}" if kept else "there is no checkpoint yet (train.save_every)"
        lower = f"go on with a lower rate: dpkd train --resume {folder.path} --set train.lr=..."
        raise NotFinite(f"training stopped: {error}\n{where}; {lower}") from error


def _resume_call(folder: RunFolder, in_memory: InMemory) -> str:
    objects = [f"{name.rpartition(':')[2]}=..." for name in (*in_memory.models, *in_memory.data)]
    if not objects:
        return f"dpkd train --resume {folder.path}"
    return f"dpkd.resume({', '.join([repr(str(folder.path)), *objects])}), with the same objects"


def _write_teacher_text(run_parts: RunParts, again: str) -> None:
    """The teacher's responses go into the store one by one: an interrupt here may be at once."""
    try:
        run_parts.prepare_sources()
    except KeyboardInterrupt:
        raise Stopped(f"stopped while the teacher wrote; what it wrote is kept; {again}", signal.SIGINT) from None


def _dev(resolved: Resolved, folder: RunFolder, run_parts: RunParts, accelerator: Accelerator) -> Dev | None:
    """The evaluation on held-out rows while training, where the settings name some."""
    if run_parts.run_data.dev is None:
        return None
    teacher = run_parts.teacher if run_parts.teacher is not None and run_parts.teacher.measurable else None
    return Dev(
        settings=resolved.settings.dev,
        inputs=run_parts.run_data.dev,
        tokenizer=run_parts.run_data.tokenizer,
        teacher=teacher,
        vocabulary=run_parts.vocabulary,
        seed=resolved.settings.seed,
        folder=folder,
        is_main=accelerator.is_main_process,
        specs=metric_specs(resolved.registry),
        first=any(group.source.config.follows_dev for group in run_parts.builder.groups),
    )


def _callbacks(
    resolved: Resolved, folder: RunFolder, run_parts: RunParts, accelerator: Accelerator, dev: Dev | None
) -> list[Callback]:
    """What a run does beside training. The logs are the main process's alone."""
    found: list[Callback] = [] if dev is None else [dev]
    if not accelerator.is_main_process:
        return found
    trackers = Trackers(resolved.settings.train.trackers, folder.path, folder.path.name, resolved.as_dict())
    samples = SampleLog(folder.samples, run_parts.run_data.tokenizer, run_parts.run_data.data.prompts)
    return [MetricsLog(folder.metrics), trackers, RunawayGuard(), samples, *found]
