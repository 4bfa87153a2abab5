"""The losses of a run: the main one and those beside it, each with its settings, text and schedules, all checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from dpkd.api import LossConfig, LossSpec, Signal, SourceConfig, SourceSpec, Text
from dpkd.config.problems import LONGEST_NAME
from dpkd.config.settings import ScheduleSettings
from dpkd.plugins import RegisteredLoss


@dataclass(frozen=True)
class Objective:
    """One loss of a run. Where it `shares_text`, it takes the responses of the main loss, and `text` is theirs."""

    name: str  # main, or what the user calls it
    registered: RegisteredLoss
    config: LossConfig
    weight: float
    source: SourceSpec
    text: SourceConfig  # the settings of the source
    schedules: Mapping[str, ScheduleSettings]
    shares_text: bool = False

    @property
    def spec(self) -> LossSpec:
        return self.registered.spec

    @property
    def writers(self) -> frozenset[Text]:
        """Everybody who writes the responses that it is taken of."""
        return frozenset(self.text.writers)

    @property
    def reads(self) -> frozenset[Signal]:
        """Everything that it reads at any point of its schedules."""
        ends = [{name: getattr(s, end) for name, s in self.schedules.items()} for end in ("start", "end")]
        middle = {name: (s.start + s.end) / 2 for name, s in self.schedules.items()}
        configs = [self.config.model_copy(update=update) for update in ({}, *ends, middle)]
        return frozenset().union(*(self.spec.signals(config) for config in configs))


def schedule_problems(
    spec: LossSpec, config: LossConfig, schedules: Mapping[str, ScheduleSettings], path: str
) -> list[str]:
    """What is wrong with schedules: settings that do not exist, are no numbers, or leave their range."""
    problems = []
    for name, schedule in schedules.items():
        value = getattr(config, name, None) if name in spec.config.model_fields else None
        numeric = [f for f in spec.config.model_fields if _is_number(getattr(config, f))]
        if not _is_number(value):
            problems.append(_no_such(spec, numeric, name, path))
            continue
        for end in ("start", "end"):
            try:
                spec.config.model_validate({**config.model_dump(), name: getattr(schedule, end)})
            except ValidationError as error:
                what = error.errors()[0]["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
                problems.append(f"{path}.{name}.{end}: should be {what} (got {getattr(schedule, end)})")
    return problems


def without_misspelt(spec: LossSpec, given: Any, path: str) -> tuple[Any, list[str]]:
    """Schedules as given, less those of settings that the loss does not have, and a sentence for each of these.

    Of these it does not matter what their blocks lack.
    """
    if not isinstance(given, Mapping):
        return given, []
    defaults = spec.config()
    numeric = [field for field in spec.config.model_fields if _is_number(getattr(defaults, field))]
    foreign = [name for name in given if name not in spec.config.model_fields]
    kept = {name: schedule for name, schedule in given.items() if name not in foreign}
    return kept, [_no_such(spec, numeric, name, path) for name in foreign]


def _no_such(spec: LossSpec, numeric: Sequence[str], name: str, path: str) -> str:
    near = get_close_matches(name[:LONGEST_NAME], numeric, n=1)
    hint = f"; did you mean {path}.{near[0]}?" if near else ""
    return (
        f"{path}.{name}: {spec.name} has no numeric setting of that name ({', '.join(numeric) or 'it has none'}){hint}"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def kept_tokens(objectives: Sequence[Objective]) -> int:
    """How many of the teacher's likeliest tokens the losses need; 0: none reads them."""
    return max(
        (o.spec.top_k(o.config) for o in objectives if o.spec.top_k and Signal.TEACHER_LOGITS in o.reads), default=0
    )


def chosen_ids(objectives: Sequence[Objective]) -> int:
    """How many of the student's likeliest tokens the losses read; 0: none reads them."""
    return max((o.spec.chosen_k(o.config) for o in objectives if o.spec.chosen_k), default=0)
