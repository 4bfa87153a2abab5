"""All that a plugin imports: specs, settings, base classes, signals and the hook marker.

A plugin is one module with a frozen config, a loss class, one `SPEC` and one hook:

    @hookimpl
    def dpkd_losses():
        return [SPEC]

It says the mathematics of its paper and stops there. The engine shifts, masks, packs, chunks, reduces, samples,
moves devices and logs. Shapes in names: N response positions, V vocabulary, B pairs, K layers, H hidden.
"""

from __future__ import annotations

from typing import Any

import pluggy

from dpkd.api.callbacks import Callback, Training
from dpkd.api.cards import Card, Source
from dpkd.api.generators import (
    Ability,
    GenerationModel,
    Sampled,
    Sampler,
    SamplerConfig,
    SamplerMemory,
    SamplerSpec,
    SamplingTask,
)
from dpkd.api.inputs import (
    HIDDEN,
    Layers,
    Pair,
    PairInputs,
    Rollout,
    RolloutInputs,
    Signal,
    Stack,
    TokenInputs,
    UndeclaredSignal,
)
from dpkd.api.losses import (
    Family,
    Loss,
    LossConfig,
    LossSpec,
    PairLoss,
    RolloutLoss,
    TeacherAccess,
    Text,
    TokenLoss,
    Trait,
    preset,
    setting,
)
from dpkd.api.metrics import Answers, MetricSpec, TokenScores
from dpkd.api.source_base import SourceBase
from dpkd.api.sources import (
    Refreshed,
    Response,
    ResponseSource,
    SamplingSettings,
    SourceConfig,
    SourceContext,
    SourcePlan,
    SourceSpec,
    StepResponses,
    TeacherGuided,
    Written,
)
from dpkd.api.teachers import (
    SharedVocabulary,
    Teacher,
    TeacherBatch,
    TeacherLost,
    TeacherOffer,
    TeacherOutput,
    TeacherSpec,
    TeacherText,
    Wants,
)
from dpkd.errors import warn_renamed
from dpkd.settings import Block

__all__ = [
    "HIDDEN",
    "Ability",
    "Answers",
    "Block",
    "Callback",
    "Card",
    "Family",
    "GenerationModel",
    "Layers",
    "Loss",
    "LossConfig",
    "LossSpec",
    "MetricSpec",
    "Pair",
    "PairInputs",
    "PairLoss",
    "Refreshed",
    "Response",
    "ResponseSource",
    "Rollout",
    "RolloutInputs",
    "RolloutLoss",
    "Sampled",
    "Sampler",
    "SamplerConfig",
    "SamplerMemory",
    "SamplerSpec",
    "SamplingSettings",
    "SamplingTask",
    "SharedVocabulary",
    "Signal",
    "Source",
    "SourceBase",
    "SourceConfig",
    "SourceContext",
    "SourcePlan",
    "SourceSpec",
    "Stack",
    "StepResponses",
    "Teacher",
    "TeacherAccess",
    "TeacherBatch",
    "TeacherGuided",
    "TeacherLost",
    "TeacherOffer",
    "TeacherOutput",
    "TeacherSpec",
    "TeacherText",
    "Text",
    "TokenInputs",
    "TokenLoss",
    "TokenScores",
    "Training",
    "Trait",
    "UndeclaredSignal",
    "Wants",
    "Written",
    "hookimpl",
    "preset",
    "setting",
]

hookimpl = pluggy.HookimplMarker("dpkd")

_RENAMED = {"Writer": "GenerationModel"}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warn_renamed(f"dpkd.api.{name}", _RENAMED[name])
        return globals()[_RENAMED[name]]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
