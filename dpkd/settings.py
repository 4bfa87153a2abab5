"""The base of every block of settings: closed, frozen, described."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator


class Block(BaseModel):
    """A block of run settings. Unknown keys are mistakes; values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _none_is_a_word(cls, values: Any) -> Any:
        return with_none(cls, values)


def with_none(model: type[BaseModel], values: Any) -> Any:
    """The values with None for the word `none`, where a setting may be None and may not be that text.

    YAML's word is `null`, but cards and messages say `none`.
    """
    if not isinstance(values, dict):
        return values
    return {
        key: None if value in ("none", "None") and _means_none(model, key) else value for key, value in values.items()
    }


def _means_none(model: type[BaseModel], key: str) -> bool:
    options = get_args(model.model_fields[key].annotation) if key in model.model_fields else ()
    texts = [option for option in options if option is str or "none" in get_args(option)]
    return type(None) in options and not texts


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted path.

    >>> flat({"train": {"lr": 0.1, "betas": [1, 2]}, "terms": {}, "seed": 3})
    {'train.lr': 0.1, 'train.betas': [1, 2], 'terms': {}, 'seed': 3}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        found |= flat(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
    return found
