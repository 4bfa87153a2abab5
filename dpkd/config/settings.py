"""The settings of a run: one closed model, composed of the blocks of its parts.

The block `loss` is `{name: ..., and the loss's own settings}`; it is checked against the config class of the
installed plugin, and so is not here (see `dpkd.config.resolve`). The block `text` is checked against the config class
of the source that it names, and is here as that.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from dpkd.api import SourceConfig
from dpkd.config.problems import checked
from dpkd.data.settings import CorpusSettings, DataSettings
from dpkd.errors import SettingsError
from dpkd.models.optimizers import OPTIMIZERS, optimizer_kind
from dpkd.models.schedules import ScheduleName, schedule_problem
from dpkd.models.settings import StudentSettings, TeacherSettings
from dpkd.rollout.dataset import DatasetConfig
from dpkd.settings import Block


class LmTerm(Block):
    """Cross-entropy on the data set's own responses, beside the main loss."""

    weight: float = Field(0.0, ge=0, description="0: off")


class PretrainTerm(Block):
    """The paper's L_pt: language modelling on plain text, optionally mixed with word-level KD as released code does."""

    weight: float = Field(0.0, ge=0, description="λ; 0: off (the DPKD script: 0.5; the paper gives no value)")
    kd_ratio: float = Field(
        0.0, ge=0, le=1, description="share of word-level KD from the teacher (released code: 0.5; paper: 0)"
    )
    batch_size: int | None = Field(None, ge=1, description="blocks of text per optimizer step; None: train.batch_size")
    corpus: CorpusSettings | None = Field(None, description="the plain text")

    @model_validator(mode="after")
    def _has_text(self) -> PretrainTerm:
        if self.weight > 0 and self.corpus is None:
            raise ValueError("a weight above 0 needs `corpus.path`: a file of plain text, one document per line")
        return self


class ScheduleSettings(Block):
    """How a numeric setting of a loss follows the step."""

    shape: Literal["linear", "cosine", "by-loss"] = Field(
        "linear",
        description="linear; cosine: slow at both ends; by-loss: faster than linear while the loss falls (TAID)",
    )
    start: float = Field(description="value at the first step")
    end: float = Field(description="value at the last step of the schedule, kept from there on")
    steps: int | None = Field(None, ge=1, description="length of the schedule; None: the whole run")
    rate: float = Field(5e-4, gt=0, description="with by-loss: α, the largest share of the way in a step (TAID)")
    momentum: float = Field(0.99, ge=0, lt=1, description="with by-loss: of the relative fall of the loss (TAID)")


class ExtraTerm(Block):
    """Another loss beside the main one, with its own weight, settings and text."""

    loss: str = Field(description="name of an installed loss")
    weight: float = Field(1.0, gt=0, description="factor of this loss")
    settings: dict[str, Any] = Field({}, description="the loss's own settings")
    text: dict[str, Any] | None = Field(
        None,
        description="who writes its responses, as `text`; None: the main loss's where it fits, else as it suggests",
    )
    schedules: dict[str, ScheduleSettings] = Field({}, description="its settings that follow the step, by name")


class TermSettings(Block):
    """Terms added to the main loss; each is logged unweighted and weighted."""

    main: float = Field(1.0, gt=0, description="weight of the main loss")
    extra: dict[str, ExtraTerm] = Field({}, description="further losses, by a name of your choice")
    lm: LmTerm = Field(LmTerm(), description="LM term on data-set responses")
    pretrain: PretrainTerm = Field(PretrainTerm(), description="pre-training term on plain text")

    @model_validator(mode="after")
    def _names_are_free(self) -> TermSettings:
        for name in self.extra:
            if name in ("main", "lm", "pretrain") or not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
                raise ValueError(
                    f"`extra` needs names of lower-case letters, digits and dashes, other than main, lm and pretrain; "
                    f"got {name!r}"
                )
        return self


Decay = Annotated[float, Field(ge=0, lt=1)]  # of a moving average


class TrainSettings(Block):
    """The optimizer and the loop."""

    steps: int | None = Field(None, ge=1, description="optimizer steps; None: `epochs` of the data")
    epochs: float = Field(1.0, gt=0, description="passes over the data when `steps` is not given")
    batch_size: int = Field(8, ge=1, description="examples per optimizer step, over all processes")
    micro_batch_size: int = Field(
        8,
        ge=1,
        description="sequences per forward pass and process; gradients are accumulated up to batch_size, so that it "
        "never changes a result",
    )
    lr: float = Field(
        5e-4,
        gt=0,
        description="peak learning rate; where neither you nor the loss gives one, it follows the student's size: 5e-4 "
        "below 200 M parameters, 5e-5 below 1 B, 1e-5 above; adapters (LoRA) 1e-3, 5e-4, 2e-4",
    )
    min_lr: float = Field(1e-7, ge=0, description="learning rate at the end of the cosine or linear schedule")
    schedule: ScheduleName = Field("cosine", description="shape after the warm-up; other names as in transformers")
    schedule_settings: dict[str, Any] = Field({}, description="settings of a schedule of transformers")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from 0")
    optimizer: str = Field(
        "adamw",
        description=f"{', '.join(OPTIMIZERS)}, lion, or a name that transformers has, such as adamw_8bit or rmsprop",
    )
    optimizer_settings: dict[str, Any] = Field({}, description="its own settings, such as momentum of muon")
    weight_decay: float = Field(1e-2, ge=0, description="not on biases and norms")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="of the AdamW family")
    eps: float = Field(1e-8, gt=0, description="of the AdamW family")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient; None: no clipping")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of a moving average of the weights, which is evaluated and saved in their place (0.99)",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="autocast; log-probs are float32 in all; auto: bf16 on a GPU that has it, else fp32"
    )
    chunk_mib: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="MiB of one chunk of logits, rows per chunk follow from it; auto: 32 on a CPU, up to 128 on a GPU",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="compile the models' layers and the losses (half a minute at the start); auto: on a GPU, if the "
        "steps of a run, or of a sweep in one process, win it back (300); not the layers where CUDA graphs run them",
    )
    cuda_graphs: Literal["auto", "off"] = Field(
        "auto",
        description="auto: on a GPU, with one process, forward and backward passes are recorded once for each shape "
        "and replayed, so that the GPU does not wait for the host",
    )
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    save_every: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        "auto", description="steps between checkpoints; auto: about every ten minutes; None: at the end and on a stop"
    )
    keep_checkpoints: int = Field(
        2, ge=1, description="number of recent checkpoints to keep; a damaged newest one falls back to the one before"
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field([], description="also log to these")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where to train")

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) must not be above lr ({self.lr})")
        if problem := schedule_problem(self.schedule, self.schedule_settings, self.lr):
            raise ValueError(f"schedule_settings: {problem}")
        return self

    @field_validator("optimizer")
    @classmethod
    def _can_be_used(cls, name: str) -> str:
        optimizer_kind(name)
        return name

    @model_validator(mode="after")
    def _optimizer_has_these_settings(self) -> TrainSettings:
        try:
            checked(optimizer_kind(self.optimizer).settings, self.optimizer_settings, "optimizer_settings")
        except SettingsError as error:
            raise ValueError("; ".join(error.problems)) from error
        return self

    @property
    def own_optimizer_settings(self) -> Block:
        """The checked settings of the optimizer, with its defaults."""
        return optimizer_kind(self.optimizer).settings.model_validate(self.optimizer_settings)


class BatchSettings(Block):
    """How the sequences of a step are laid out for the forward passes; never changes a result."""

    tokens: int | None = Field(
        None,
        ge=1,
        description="tokens per forward pass and process, padding included (beside train.micro_batch_size); None: any",
    )
    shared_prompts: bool = Field(
        True, description="place the responses of a pair after one copy of their prompt, if the models support it"
    )
    packing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="the sequences of a forward pass in one row, without padding; auto: on a GPU in half precision, "
        "with flash attention, and on a CPU where it saves a tenth of a large model's tokens",
    )
    probe: bool = Field(
        False, description="run the longest forward and backward pass first, to detect out-of-memory errors immediately"
    )


class DevSettings(Block):
    """Evaluation while training, on held-out rows; the best model by one metric becomes the run's model."""

    path: str | None = Field(None, description="held-out rows (file or hub id), never the test set; None: off")
    split: str = Field("validation", description="split of a hub data set")
    limit: int = Field(64, ge=1, description="only the first rows: the fixed probe set")
    every: int = Field(100, ge=1, description="optimizer steps between evaluations")
    metric: str = Field("rouge_l", description="metric that selects the best model")
    patience: int | None = Field(None, ge=1, description="stop after this many evaluations without improvement")
    temperature: float = Field(1.0, ge=0, description="of the answers, as in `dpkd eval`; 0 is greedy")
    max_new_tokens: int = Field(128, ge=1, description="length limit of an answer")
    batch_size: int = Field(32, ge=1, description="answers written together")


class RunSettings(Block):
    """Everything that decides a run, but for the loss's own settings."""

    teacher: TeacherSettings = TeacherSettings()
    student: StudentSettings = StudentSettings()
    data: DataSettings = DataSettings()
    text: SerializeAsAny[SourceConfig] = DatasetConfig()
    terms: TermSettings = TermSettings()
    train: TrainSettings = TrainSettings()
    batch: BatchSettings = BatchSettings()
    dev: DevSettings = DevSettings()
    schedules: dict[str, ScheduleSettings] = Field({}, description="settings of the loss that follow the step, by name")
    output: str | None = Field(None, description="run folder; None: runs/LOSS-N")
    seed: int = Field(10, ge=0, description="seed of data order, sampling and initial weights (MiniLLM's scripts: 10)")
