"""The flags of `dpkd eval`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dpkd.cli.score import Unit


class OnRow(StrEnum):
    """What to do with a row that cannot be scored."""

    ERROR = "error"
    SKIP = "skip"


class DType(StrEnum):
    """The type of the weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    AUTO = "auto"


class Template(StrEnum):
    """How a prompt is written."""

    AUTO = "auto"
    ALPACA = "alpaca"
    CHAT = "chat"
    NONE = "none"


Models = Annotated[list[str], typer.Option(help="run folder, model folder or hub id; repeatable")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        help="a file, folder, hub id, or dolly, self-inst, vicuna, sinst, uinst; repeatable", show_default=False
    ),
]
Tasks = Annotated[
    str | None, typer.Option(help="benchmarks of lm-eval, such as ifeval,gsm8k (needs dpkd[tasks])", show_default=False)
]
IncludePath = Annotated[
    Path | None, typer.Option(help="folder of further tasks for lm-eval, as YAML", show_default=False)
]
NumFewshot = Annotated[
    int | None, typer.Option(help="examples before each question of a task [default: the task's]", min=0)
]
Teacher = Annotated[
    str | None, typer.Option(help="teacher for the divergences [default: the run's]", show_default=False)
]
Seeds = Annotated[str, typer.Option(help="seeds of the sampling")]
Greedy = Annotated[bool, typer.Option("--greedy", help="decode greedily, once, instead of sampling")]
Temperature = Annotated[float, typer.Option(help="of the sampling", min=0.0)]
TopP = Annotated[float, typer.Option(help="nucleus", min=0.0, max=1.0)]
TopK = Annotated[int, typer.Option(help="0: all tokens", min=0)]
MaxNewTokens = Annotated[int, typer.Option(help="length limit of an answer", min=1)]
BatchSize = Annotated[int, typer.Option(help="answers written together", min=1)]
Weights = Annotated[
    DType, typer.Option(help="type of the weights; half precision is faster, but answers depend on the batch")
]
Limit = Annotated[int | None, typer.Option(help="only the first rows", min=1, show_default=False)]
TemplateFlag = Annotated[
    Template | None, typer.Option(help="prompt template [default: the set's, else the run's, else auto]")
]
OnBadRow = Annotated[OnRow | None, typer.Option(help="rows that cannot be read: stop, or skip and count them")]
LongPrompts = Annotated[
    OnRow, typer.Option(help="prompts beyond data.max_prompt_tokens or the context: stop, or skip and count")
]
SetsFolder = Annotated[
    str | None, typer.Option(help="folder of the papers' sets [default: $DPKD_SETS, else the hub]", show_default=False)
]
Cuts = Annotated[str, typer.Option(help="upper bounds of the reference-length buckets; '': none")]
UnitFlag = Annotated[Unit, typer.Option(help="unit of the cuts; tokens: the model's")]
Rewards = Annotated[
    bool, typer.Option("--rewards", help="also compute implicit rewards of the model's and the teacher's answers")
]
Output = Annotated[Path | None, typer.Option(help="folder of the results [default: RUN/eval/SET]", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
