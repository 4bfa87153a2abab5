"""How whoever asks for rows would say what: each caller's own names for a set, its settings and its options."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """The places that messages about a set of rows name.

    path          what names the set
    own_file      how another set is named
    each          a setting of the block `data`, with `{name}` and `{value}`; `block` has `%s` for all of them
    between       what stands between two of them
    split         how another split is chosen; None: as any other setting
    long_prompts  how rows with prompts beyond the limits are skipped
    """

    path: str = "data.path"
    own_file: str = "--data FILE.jsonl"
    each: str = "--set data.{name}={value}"
    between: str = " "
    block: str = "%s"
    split: str | None = None
    long_prompts: str = "--long-prompts skip"

    def settings(self, **values: object) -> str:
        """How settings of the block `data` are given."""
        parts = [self.each.format(name=name, value=value) for name, value in values.items()]
        return self.block % self.between.join(parts)

    @property
    def other_split(self) -> str:
        """How another split is chosen."""
        return self.split or self.settings(split="NAME")


TRAINING = Wording()
COMMAND_LINE = Wording(path="--data")
DEVELOPMENT = Wording(path="dev.path", own_file="--set dev.path=FILE.jsonl", split="--set dev.split=NAME")
PYTHON = Wording(
    path="data",
    own_file="data='FILE.jsonl'",
    each="'data.{name}': {value!r}",
    between=", ",
    block="settings={%s}",
    long_prompts="long_prompts='skip'",
)
SWEEP = Wording(
    path="evaluate.data",
    own_file="evaluate: {data: [FILE.jsonl]} in the sweep's file",
    each="{name}: {value}",
    between=", ",
    block="evaluate: {options: {set: {%s}}} in the sweep's file",
    long_prompts="evaluate: {options: {long_prompts: skip}} in the sweep's file",
)
