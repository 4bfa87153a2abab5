"""Checks that call no mathematics: the settings, the card, the declared signals."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from dpkd.api import HIDDEN, Card, Family, LossConfig, Rollout, RolloutLoss, Signal, UndeclaredSignal
from dpkd.errors import SettingsError
from dpkd.testing.inputs import Inputs, rollout_of
from dpkd.testing.results import CheckFailed
from dpkd.testing.subject import Check, LossUnderTest, fail, require

SUGGESTED = ("data", "text", "terms", "train", "student", "teacher", "schedules")


def config_is_closed(subject: LossUnderTest) -> None:
    """Unknown settings are refused, values cannot change later, infinities are refused, JSON gives the same back."""
    config, kind = subject.config, type(subject.config)
    require(issubclass(kind, LossConfig), f"{kind.__name__} should inherit from dpkd.api.LossConfig")
    require(
        _refused(kind, {**config.model_dump(), "no_such_setting": 1}),
        f"{kind.__name__} takes a setting that it does not have: keep extra='forbid' of LossConfig",
    )
    require(
        kind.model_config.get("frozen") is True,
        f"{kind.__name__} can be changed after it was made: keep frozen=True of LossConfig",
    )
    again = kind.model_validate_json(config.model_dump_json())
    require(again == config, f"{kind.__name__} comes back from JSON as {again!r}, expected {config!r}")
    for name, value in config.model_dump().items():
        if isinstance(value, float):
            require(
                _refused(kind, {**config.model_dump(), name: math.nan}),
                f"{kind.__name__}.{name} takes nan: keep allow_inf_nan=False of LossConfig",
            )


def _refused(kind: type[LossConfig], values: dict[str, Any]) -> bool:
    try:
        kind.model_validate(values)
    except ValidationError:
        return True
    return False


def card_is_complete(subject: LossUnderTest) -> None:
    """Name, card, docstrings, described settings and suggestions: what a user reads before choosing a loss."""
    missing = [*_card_gaps(subject), *_setting_gaps(subject), *_suggestion_gaps(subject)]
    if missing:
        fail("; ".join(missing))


def _card_gaps(subject: LossUnderTest) -> Iterator[str]:
    spec = subject.spec
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", spec.name):
        yield f"the name {spec.name!r} should be lower-case letters and digits with dashes between"
    for part in fields(Card):
        if part.name not in ("notes", "latex", "unconfirmed") and not getattr(spec.card, part.name):
            yield f"the card has no {part.name}"
    if "\n" in spec.card.summary:
        yield "the card's summary should be one line"
    for source in spec.card.sources:
        if not source.title or not re.match(r"https?://", source.url):
            yield f"the source {source.title!r} should have a title and a link, found {source.url!r}"
    for kind in (spec.loss, spec.config):
        if not (kind.__doc__ or "").strip():
            yield f"the class {kind.__name__} has no docstring"


def _setting_gaps(subject: LossUnderTest) -> Iterator[str]:
    for name, field in subject.spec.config.model_fields.items():
        extra = field.json_schema_extra
        if not field.description:
            yield f"the setting {name!r} has no description: use dpkd.api.setting"
        if not (isinstance(extra, dict) and extra.get("source")):
            yield f"the setting {name!r} does not say where its default comes from: use dpkd.api.setting(source=...)"


def _suggestion_gaps(subject: LossUnderTest) -> Iterator[str]:
    from dpkd.config.extras import own_text
    from dpkd.config.settings import RunSettings
    from dpkd.plugins import load_registry

    suggests = dict(subject.spec.suggests)
    unknown = [key for key in suggests if key not in SUGGESTED]
    if unknown:
        yield f"suggests has {', '.join(map(repr, unknown))}; a loss may suggest only {', '.join(SUGGESTED)}"
        return
    try:
        RunSettings.model_validate({name: block for name, block in suggests.items() if name != "text"})
        own_text(subject.spec, {}, "text", load_registry())
    except SettingsError as error:
        yield from (f"suggests {problem}" for problem in error.problems)
    except ValidationError as error:
        for problem in error.errors():
            yield f"suggests {'.'.join(map(str, problem['loc']))}: {problem['msg']} (got {problem['input']!r})"


def only_declared_signals(subject: LossUnderTest) -> None:
    """The loss reads what its spec declares, all of it and nothing else."""
    if HIDDEN & subject.reads:
        others = sorted(subject.reads - HIDDEN - {Signal.TARGETS})
        require(
            subject.spec.family is Family.TOKEN and not others,
            f"a loss on hidden states is a token loss and reads nothing but these and targets, found {others}: logits "
            "come a few rows at a time. Make it two losses",
        )
    batch = subject.batch()
    read: set[Signal] = set()
    loss = subject.build()
    try:
        loss(_recording(batch.inputs(subject.reads), read))
    except UndeclaredSignal as error:
        raise CheckFailed(str(error)) from error
    if unread := subject.reads - read:
        # A rollout loss may use a signal in its advantages only.
        if isinstance(loss, RolloutLoss):
            rollout, seen = _recording_rollout(rollout_of(batch))
            loss.advantages(rollout)
            unread -= {Signal(name) for name in seen}
        names = ", ".join(sorted(unread))
        require(
            not unread,
            f"the spec declares {names}, which the loss never reads under these settings: LossSpec.reads may be a "
            "function of the config",
        )


def _recording(x: Inputs, read: set[Signal]) -> Inputs:
    """The same inputs, writing down what is read."""

    class Recording(type(x)):  # type: ignore[misc]
        def __getitem__(self, signal: Signal) -> Any:
            value = super().__getitem__(signal)
            read.add(signal)
            return value

    return Recording(x._signals)


def _recording_rollout(rollout: Rollout) -> tuple[Rollout, set[str]]:
    """The same collection, writing down which log-probs are read, and whether rewards are."""
    seen: set[str] = set()

    class Recording(Rollout):
        def __getattribute__(self, name: str) -> Any:
            if name.endswith("_logps") or name == Signal.REWARDS:
                seen.add(name)
            return super().__getattribute__(name)

    recording = Recording(**vars(rollout))
    seen.clear()
    return recording, seen


CHECKS = (Check(config_is_closed), Check(card_is_complete), Check(only_declared_signals))
