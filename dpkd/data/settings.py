"""Settings of the data that a run reads."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dpkd.settings import Block

DEFAULT_DATA = "databricks/databricks-dolly-15k"


class Columns(Block):
    """Which column holds what; what is left out is detected from the first row."""

    instruction: str | None = Field(None, description="column of the instruction")
    input: str | None = Field(None, description="column of the optional input (Dolly: context)")
    output: str | None = Field(None, description="column of the response, of a list of references, or of messages")
    prompt: str | None = Field(None, description="column of a ready prompt, or of messages up to the response")
    messages: str | None = Field(None, description="column of chat messages (role and content, or from and value)")
    rejected: str | None = Field(None, description="column of the rejected response of a pair")

    @model_validator(mode="after")
    def _one_kind_of_prompt(self) -> Columns:
        given = [name for name in ("instruction", "prompt", "messages") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"name one of instruction, prompt and messages, not {' and '.join(given)}")
        if self.prompt and self.input:
            raise ValueError("a ready `prompt` has no `input`: name `instruction` instead of `prompt`")
        if self.messages and (self.input or self.output):
            raise ValueError("`messages` hold the response too: leave `input` and `output` out")
        return self


Template = Literal["auto", "alpaca", "chat", "none"]


class MixPart(Block):
    """One data set of a mixture; what is left out is as in the block `data`."""

    path: str = Field(description="as data.path")
    weight: float = Field(1.0, gt=0, description="how often a row is taken from this data set, relative to the others")
    subset: str | None = Field(None, description="as data.subset")
    split: str | None = Field(None, description="as data.split")
    columns: Columns | None = Field(None, description="as data.columns")
    template: Template | None = Field(None, description="as data.template")
    limit: int | None = Field(None, ge=1, description="as data.limit")


class DataSettings(Block):
    """Instruction data: where it is, how a row is read, what is kept."""

    path: str = Field(DEFAULT_DATA, description="hub id, or a JSONL, JSON, CSV or parquet file, or a folder of them")
    subset: str | None = Field(None, description="configuration name of a hub data set")
    split: str = Field("train", description="split of a hub data set")
    mix: tuple[MixPart, ...] = Field((), description="several data sets, in place of `path`: a list of blocks")
    mix_until: Literal["first_exhausted", "all_exhausted"] = Field(
        "first_exhausted",
        description="end a mixture when the first data set is exhausted, or repeat rows until all are",
    )
    columns: Columns = Field(Columns(), description="column names, if detection does not find them")
    template: Template = Field(
        "auto",
        description="how a prompt is written: the papers' Alpaca form, the tokenizer's chat template, or as it is; "
        "auto: chat where the tokenizer has a chat template, else alpaca for instructions and none for ready prompts",
    )
    chat_template: str | None = Field(
        None, description="file of a chat template (Jinja) that replaces the tokenizer's, and is saved with the model"
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="assistant turns of a conversation to train on: each becomes one example"
    )
    drop_rejected: bool = Field(False, description="train only on the chosen responses of preference data")
    max_prompt_tokens: int = Field(256, ge=1, description="rows with a longer prompt are dropped and counted")
    max_tokens: int = Field(512, ge=2, description="prompt and response together; longer responses are truncated")
    min_response_words: int = Field(
        0, ge=0, description="keep responses longer than this many words (the DPKD paper: 10); 0 keeps all"
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="a row that cannot be read: stop, or skip and count"
    )
    limit: int | None = Field(None, ge=1, description="read at most this many rows")
    streaming: bool = Field(False, description="read rows one by one up to `limit`, without the whole download")

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        if self.mix and self.path != DEFAULT_DATA:
            raise ValueError(f"`mix` names the data sets, so leave `path` ({self.path}) out")
        return self

    @model_validator(mode="after")
    def _room_for_a_response(self) -> DataSettings:
        if self.max_tokens <= self.max_prompt_tokens:
            raise ValueError(
                f"max_tokens ({self.max_tokens}) must be larger than max_prompt_tokens ({self.max_prompt_tokens}): "
                "the response needs room"
            )
        if self.streaming and self.limit is None:
            raise ValueError("streaming needs `limit`: the number of rows to read")
        return self


class CorpusSettings(Block):
    """Plain text for the pre-training term: one document per line (or a column `text`)."""

    path: str = Field(
        description="a .txt file with one document per line, a JSONL/parquet file with `text`, or a hub id"
    )
    split: str = Field("train", description="split of a hub data set")
    column: str = Field("text", description="column of the text")
    max_tokens: int = Field(512, ge=2, description="documents are joined with EOS and cut into blocks of this length")
    limit: int | None = Field(None, ge=1, description="read at most this many documents")
