"""Settings of the two models."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from dpkd.settings import Block

DType = Literal["auto", "float32", "bfloat16", "float16"]


def is_address(name: Any) -> bool:
    """Whether a name is the address of a server."""
    return isinstance(name, str) and name.startswith(("http://", "https://"))


class ModelSettings(Block):
    """Where a model is and how it is loaded."""

    model: str | None = Field(None, description="hub id or folder (safetensors), or a .gguf file")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    dtype: DType = Field("auto", description="type of the weights; auto: as stored (teacher), float32 (student)")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field("auto", description="attention code")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="packed weights, through bitsandbytes: LLM.int8 or NF4; embeddings and head stay as they are; of "
        "a student, beside `lora` (QLoRA)",
    )

    @model_validator(mode="after")
    def _weights_can_be_packed(self) -> ModelSettings:
        if self.quantization != "none" and (self.model or "").lower().endswith(".gguf"):
            raise ValueError("`quantization` takes a folder of safetensors or a hub id, and `model` is a .gguf file")
        return self


class ClientSettings(Block):
    """How a served teacher is talked to."""

    in_flight: int = Field(32, ge=1, description="requests that a server works on at a time")
    connect_timeout: float = Field(10.0, gt=0, description="seconds until a server must accept a connection")
    read_timeout: float = Field(300.0, gt=0, description="seconds until a server must answer")
    retries: int = Field(5, ge=0, description="attempts after 429, 5xx or a lost connection, with growing pauses")
    wait: float = Field(
        0.0, ge=0, description="seconds to go on trying when no server answers; 0: stop the run at a checkpoint"
    )
    key_variable: str = Field(
        "OPENAI_API_KEY", description="environment variable with the server's key; the key itself is never written"
    )
    cache_tokens: int = Field(1_000_000, ge=0, description="response tokens whose answers are kept in memory")


class TeacherSettings(ModelSettings):
    """The frozen model that is imitated."""

    device: str | None = Field(None, description="device of the teacher, e.g. cuda:1; None: the student's")
    tokenizer: str | None = Field(None, description="hub id or folder of the tokenizer; None: the model's")
    store: str | None = Field(
        None, description="folder of a store of its log-probs (`dpkd cache`), in place of the model"
    )
    base: bool = Field(
        False, description="the student's own base: the student with its adapters switched off, no second copy"
    )
    kind: str = Field("auto", description="auto: a model or a store, as named; else an installed kind of teacher")
    settings: dict[str, Any] = Field({}, description="with a `kind` from a plugin: its own settings")

    server: str | list[str] | None = Field(
        None, description="address of the server of the teacher, or of several; `model` is its name there"
    )
    protocol: Literal["vllm", "sglang", "openai"] = Field(
        "vllm", description="what the server is; openai: any OpenAI-compatible server, which gives text only"
    )
    top_k: int | None = Field(
        None,
        ge=-1,
        description="likeliest tokens that a server is asked for at each position; -1: all; None: what the loss needs",
    )
    client: ClientSettings = Field(ClientSettings(), description="how the server is talked to")

    @property
    def servers(self) -> list[str]:
        """Addresses of the servers, without the path of their interface; empty where nothing is served."""
        urls = [self.server] if isinstance(self.server, str) else self.server or []
        return [url.rstrip("/").removesuffix("/v1") for url in urls]

    @property
    def in_memory(self) -> bool:
        """Whether the teacher is a model in this process."""
        return self.model is not None and self.server is None

    @model_validator(mode="before")
    @classmethod
    def _an_address_is_a_server(cls, values: Any) -> Any:
        """`--teacher http://host:8000/v1` for short."""
        if isinstance(values, dict) and is_address(values.get("model")) and values.get("server") is None:
            return {**values, "model": None, "server": values["model"]}
        return values

    @field_validator("server")
    @classmethod
    def _addresses(cls, server: str | list[str] | None) -> str | list[str] | None:
        urls = [server] if isinstance(server, str) else server
        if urls is not None and not urls:
            raise ValueError("should name at least one server")
        for url in urls or []:
            parts = urlsplit(url)
            if not is_address(url) or not parts.netloc:
                raise ValueError(f"should be an address such as http://127.0.0.1:8000/v1 (got {parts.netloc or url!r})")
            if parts.username or parts.password or parts.query:
                raise ValueError(
                    "has a key or a password in the address, which would be written into the run's files; put the key "
                    "into the environment variable that teacher.client.key_variable names"
                )
        return server

    @model_validator(mode="after")
    def _one_server(self) -> TeacherSettings:
        if self.server is not None and self.kind != "auto":
            raise ValueError(f"kind {self.kind!r} takes its own settings (`settings`): leave out `server`")
        if self.server is not None and self.store is not None:
            raise ValueError("name either `server` or `store`: each takes the other's place")
        if self.server is not None and self.quantization != "none":
            raise ValueError("`quantization` packs weights in this process; a `server` is started with its own")
        if self.server is None and self.top_k is not None:
            raise ValueError("`top_k` is what a `server` is asked for, and none is named")
        return self

    @model_validator(mode="after")
    def _base_is_alone(self) -> TeacherSettings:
        named = [name for name in ("model", "store", "server") if getattr(self, name) is not None]
        if self.base and (named or self.kind != "auto" or self.quantization != "none"):
            what = ", ".join(named) or ("kind" if self.kind != "auto" else "quantization")
            raise ValueError(f"`base` is the student itself: leave out {what}")
        return self

    @model_validator(mode="after")
    def _model_or_store(self) -> TeacherSettings:
        if self.kind != "auto" and (self.store is not None or self.model is not None):
            raise ValueError(f"kind {self.kind!r} takes its own settings (`settings`): leave out `model` and `store`")
        if self.settings and self.kind == "auto":
            raise ValueError("`settings` belong to a `kind` of teacher: name it")
        if self.store is not None and self.model is not None:
            raise ValueError("name either `model` or `store`: a store takes the model's place")
        if self.quantization != "none" and self.store is not None:
            raise ValueError("`quantization` packs the weights of a model, and a `store` has none; leave it out")
        return self


class LoraSettings(Block):
    """Low-rank adapters on the student, through peft."""

    r: int = Field(16, ge=1, description="rank")
    alpha: int = Field(32, gt=0, description="scale is alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapters' input")
    targets: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="names of the modules to adapt; the output head is always left frozen"
    )


class StudentSettings(ModelSettings):
    """The model that is trained."""

    init: Literal["pretrained", "layers", "random"] = Field(
        "pretrained",
        description="pretrained: `model` as it is; layers: the teacher with some of its layers; "
        "random: fresh weights of `model`'s (or the teacher's) configuration",
    )
    layers: int | list[int] | None = Field(
        None,
        description="with init `layers` or `random`: how many of the teacher's layers (first, last and evenly between)"
        ", or which",
    )
    lora: LoraSettings | None = Field(None, description="train low-rank adapters only")
    dropout: Literal["keep", "off"] = Field("keep", description="dropout while training: the model's own, or none")
    gradient_checkpointing: bool | Literal["selective"] = Field(
        False,
        description="do not keep the activations of the forward pass, compute them again in the backward pass: less "
        "memory, more time; selective: keep those of matrix products and attention",
    )

    @model_validator(mode="before")
    @classmethod
    def _layers_say_enough(cls, values: Any) -> Any:
        """`layers` alone can only mean layers of the teacher."""
        if isinstance(values, dict) and values.get("layers") is not None and not values.get("model"):
            return {"init": "layers", **values}
        return values

    @model_validator(mode="after")
    def _packed_weights_are_frozen(self) -> StudentSettings:
        if self.quantization != "none" and (self.lora is None or self.init != "pretrained"):
            raise ValueError(
                f"`quantization` ({self.quantization}) packs weights that stay frozen, so the student needs adapters "
                "and init `pretrained`: --set student.lora.r=16"
            )
        return self

    @model_validator(mode="after")
    def _init_has_what_it_needs(self) -> StudentSettings:
        if self.init == "layers" and self.layers is None:
            raise ValueError("init `layers` needs `layers`: a number of layers to keep, or a list of their indices")
        if self.init == "pretrained" and self.layers is not None:
            raise ValueError("`layers` is used only with init `layers` or `random`")
        if isinstance(self.layers, list) and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise ValueError(f"`layers` must name each kept layer once, got {self.layers}")
        if isinstance(self.layers, int) and self.layers < 1:
            raise ValueError(f"`layers` must be at least 1, got {self.layers}")
        return self
