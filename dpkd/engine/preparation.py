"""What can be known about a run before any weight is loaded: data, number of steps, who writes."""

from __future__ import annotations

import math
from typing import Any

from dpkd.api import Family, Text
from dpkd.config.resolve import Resolved
from dpkd.config.settings import RunSettings
from dpkd.data.examples import read_examples
from dpkd.data.tokenise import TokenisedData, tokenise
from dpkd.engine.progress import Display

__all__ = ["load_data", "number_of_steps", "teacher_writes"]


def load_data(settings: RunSettings, tokenizer: Any, display: Display) -> tuple[TokenisedData, str]:
    """Read and tokenise the training data; says what was kept and dropped. Returns it with its fingerprint."""
    examples = read_examples(settings.data)
    data = tokenise(examples.examples, tokenizer, settings.data)
    for line in data.report.lines():
        display.say(line)
    return data, examples.fingerprint


def number_of_steps(settings: RunSettings, examples: int) -> int:
    """Optimiser steps of a run: `train.steps`, or as many as `train.epochs` take."""
    if settings.train.steps is not None:
        return settings.train.steps
    per_epoch = -(-examples // settings.train.batch_size)
    return max(1, math.ceil(per_epoch * settings.train.epochs * settings.text.inner_epochs))


def teacher_writes(resolved: Resolved) -> bool:
    """Whether any response of the run is the teacher's."""
    text = resolved.settings.text
    if resolved.loss.family is Family.PAIR:
        return Text.TEACHER.value in (text.pairs.preferred, text.pairs.dispreferred)
    return text.source == "teacher" or text.mix.get(Text.TEACHER, 0.0) > 0
