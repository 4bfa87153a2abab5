"""Settings of the text: who writes the response tokens, and how they are sampled."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from dpkd.api import Text
from dpkd.settings import Block


class SamplingSettings(Block):
    """How responses are drawn."""

    temperature: float = Field(1.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus: the smallest set of tokens with this mass")
    top_k: int = Field(0, ge=0, description="the k likeliest tokens; 0: all")
    max_new_tokens: int = Field(256, ge=1, description="a response without EOS ends here and is counted as truncated")
    batch_size: int = Field(32, ge=1, description="prompts sampled together")


class PairSettings(Block):
    """The two responses of a preference pair."""

    chosen: Literal["teacher", "dataset"] = Field("teacher", description="who wrote y_t")
    rejected: Literal["student", "teacher", "dataset"] = Field("student", description="who wrote y_s")

    @model_validator(mode="after")
    def _two_writers(self) -> PairSettings:
        if self.chosen == self.rejected:
            raise ValueError(f"both responses of a pair are written by {self.chosen!r}: there is nothing to prefer")
        return self


class AdaptiveSettings(Block):
    """With source `adaptive`: when the student's text takes the place of the data set's (DistiLLM)."""

    share: float = Field(0.0, ge=0, le=1, description="φ at the start: probability of student text at a step")
    rise: float = Field(0.1, gt=0, le=1, description="what φ rises by when the loss on the rows of `dev` does")
    tolerance: float = Field(
        0.1, ge=0, description="ε: how much higher (nats per token) that loss must be than when φ last rose"
    )
    capacity: int = Field(1000, ge=1, description="responses in the replay buffer; while it is not full, all are fresh")
    fresh: Literal["decreasing", "constant", "increasing"] = Field(
        "decreasing", description="share of the student's text that is fresh: from 1 to 0 over the run, ½, or 0 to 1"
    )


class TextSettings(Block):
    """Who writes the responses, and how fresh the student's are."""

    source: Literal["dataset", "teacher", "student", "mixed", "each", "adaptive"] = Field(
        "dataset", description="who writes the responses (pair losses use `pairs` instead)"
    )
    mix: dict[Text, float] = Field(
        default_factory=dict,
        description="with source `mixed`: the probability of each writer, drawn once per optimizer step",
    )
    each: tuple[Text, ...] = Field(
        (), description="with source `each`: the writers, every one of whom responds to every prompt of a step"
    )
    adaptive: AdaptiveSettings = Field(
        AdaptiveSettings(), description="with source `adaptive`: data set or student, by the loss on the rows of `dev`"
    )
    pairs: PairSettings = Field(PairSettings(), description="who writes the two responses of a pair")
    sampling: SamplingSettings = Field(SamplingSettings(), description="how the student's responses are drawn")
    teacher_sampling: SamplingSettings = Field(
        SamplingSettings(), description="how the teacher's responses are drawn (once, into the store)"
    )
    num_generations: int = Field(
        1, ge=1, description="responses that the student writes to each prompt, all of them trained on (no pair losses)"
    )
    teacher_mix: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="α: the student's responses are drawn from α p + (1-α) q at each token (MiniLLM: 0.2)",
    )
    teacher_veto: int = Field(
        0,
        ge=0,
        description="K: a token of the student's that is not among the teacher's K likeliest is drawn again, by the "
        "teacher (Speculative KD: 25); 0: off",
    )
    refresh: Literal["every_step", "every_n_steps", "per_epoch", "once"] = Field(
        "every_step", description="when the student writes anew"
    )
    every: int = Field(
        1, ge=1, description="with refresh `every_n_steps`: the n; prompts of n steps are sampled together"
    )
    num_iterations: int = Field(
        1, ge=1, description="how often the optimizer goes over the responses of one refresh (MiniLLM: 4)"
    )
    decoding: Literal["auto", "graph", "eager"] = Field(
        "auto",
        description="graph: static shapes, captured in graphs on CUDA; eager: growing caches; auto: graph on CUDA if "
        "its log-probs agree with a plain forward's (backend hf)",
    )
    backend: str = Field("hf", description="what draws responses: an installed sampler (hf: this process)")
    backend_settings: dict[str, Any] = Field({}, description="the sampler's own settings")
    store: str | None = Field(
        None, description="folder of the store of teacher responses; None: the user's cache folder"
    )

    @property
    def backend_key(self) -> dict[str, Any] | None:
        """What draws, for the key of a store; None where that is dpkd's own sampler."""
        return None if self.backend == "hf" else {"name": self.backend, **self.backend_settings}

    @model_validator(mode="after")
    def _consistent(self) -> TextSettings:
        if self.source == "mixed":
            if not self.mix or abs(sum(self.mix.values()) - 1.0) > 1e-6 or min(self.mix.values()) < 0:
                given = {key.value: value for key, value in self.mix.items()}
                raise ValueError(f"source `mixed` needs `mix`: probabilities of the writers that sum to 1, got {given}")
        elif self.mix:
            raise ValueError(f"`mix` is used only with source `mixed`, not with {self.source!r}")
        if self.teacher_mix > 0 and self.teacher_veto > 0:
            raise ValueError("`teacher_mix` and `teacher_veto` are two ways to let the teacher in: leave one out")
        self._check_each()
        if self.source == "adaptive" and self.refresh != "every_step":
            raise ValueError(f"source `adaptive` has its own replay: refresh is `every_step`, not {self.refresh!r}")
        if self.every > 1 and self.refresh != "every_n_steps":
            raise ValueError(f"`every` is used only with refresh `every_n_steps`, not with {self.refresh!r}")
        if self.num_iterations > 1 and self.refresh not in ("every_step", "every_n_steps"):
            raise ValueError("`num_iterations` is used only with refresh `every_step` or `every_n_steps`")
        return self

    def _check_each(self) -> None:
        if self.source == "each" and (len(self.each) < 2 or len(set(self.each)) < len(self.each)):
            given = [writer.value for writer in self.each]
            raise ValueError(f"source `each` needs `each`: two or three different writers, got {given}")
        if self.source != "each" and self.each:
            raise ValueError(f"`each` is used only with source `each`, not with {self.source!r}")
